"""The derivative of softmax and sigmoid attention along a direction, and torch's ways to ask for it."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import attnx
from attnx import _capability, reference
from attnx.testing import assert_close, eager_sigmoid_attention, eager_softmax_attention
from calls import has_kernel
from cases import DTYPES, FEW_SHAPES, MASKS, OPERATORS, SHAPES, Shape, random_inputs, visible_pairs

Function = Callable[..., Any]
NAMES = ("query", "key", "value")
EAGER = {"softmax_attention": eager_softmax_attention, "sigmoid_attention": eager_sigmoid_attention}
SUBSETS = [x for n in range(4) for x in itertools.combinations(NAMES, n)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernel(device: torch.device) -> None:
    if not has_kernel("softmax_attention_jvp", device):
        pytest.skip("no kernel on this device")


def drawn(
    shape: Shape, dtype: torch.dtype, device: torch.device, wanted: tuple[str, ...] = NAMES
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """query, key and value, and tangents of those that are wanted."""
    inputs, _ = random_inputs(shape, dtype, device)
    tangents, _ = random_inputs(shape, dtype, device, seed=1)
    return inputs, {f"tangent_{name}": tangents[name] if name in wanted else None for name in NAMES}


def along(operator: str, inputs: dict[str, Tensor], tangents: dict[str, Tensor | None], **options: Any) -> Any:
    """What the operator returns: the results, and then their tangents."""
    left, right = options.get("window", (-1, -1))
    bias = (options.get("bias_rule", "length"), options.get("bias", 0.0)) if operator == "sigmoid_attention" else ()
    rest = options.get("scale"), options.get("is_causal", False), left, right, options.get("position_offset", 0)
    return getattr(torch.ops.attnx, f"{operator}_jvp")(*inputs.values(), *tangents.values(), *bias, *rest)


def by_torch(function: Function, inputs: dict[str, Tensor], tangents: dict[str, Tensor | None]) -> Any:
    """The results of a function and their tangents, as torch differentiates it."""
    zeros = {name: torch.zeros_like(x) for name, x in inputs.items()}
    directions = tuple(zeros[n] if (x := tangents[f"tangent_{n}"]) is None else x for n in NAMES)
    return torch.func.jvp(function, tuple(inputs.values()), directions)


def assert_forward(results: Tensor, alone: Tensor) -> None:
    """On CUDA the forward alone has other tiles, so that it rounds elsewhere."""
    if _capability.backend_of(alone.device) == "cpu":
        assert torch.equal(results, alone)
    else:
        rounding = 4 * torch.finfo(alone.dtype).eps
        torch.testing.assert_close(results, alone, atol=rounding, rtol=rounding)


def eager_logsumexp(shape: Shape, is_causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Function:
    hidden = ~visible_pairs(shape, is_causal, window)

    def logsumexp(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[3] ** -0.5
        return logits.masked_fill(hidden.to(query.device), -3e4).logsumexp(-1)

    return logsumexp


def check(
    operator: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    wanted: tuple[str, ...] = NAMES,
    **options: Any,
) -> None:
    inputs, tangents = drawn(shape, dtype, device, wanted)
    results = along(operator, inputs, tangents, **options)
    expected = getattr(reference, f"{operator}_jvp")(**inputs, **tangents, **options)
    output, tangent = by_torch(lambda q, k, v: EAGER[operator](q, k, v, **options), inputs, tangents)
    if operator == "sigmoid_attention":
        names, baselines = ["output", "tangent_output"], [output, tangent]
    else:
        names = ["output", "logsumexp", "tangent_output", "tangent_logsumexp"]
        logsumexp, moved = by_torch(eager_logsumexp(shape, **options), inputs, tangents)
        sees = visible_pairs(shape, **options).any(-1).to(device)
        baselines = [output, logsumexp.where(sees, -math.inf), tangent, moved.where(sees, 0.0)]
    for name, x, y, baseline in zip(names, results, expected, baselines, strict=True):
        # Tangents are sums of a product of three factors, which may cancel.
        terms = expected[-1] if name == "tangent_output" and operator == "softmax_attention" else None
        terms = None if terms is None else terms[..., None].expand(y.shape)
        assert_close(x, y, baseline, name=name, dtype=dtype, terms=terms)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_reference(operator: str, shape: Shape, mask: str, device: torch.device) -> None:
    """It is what torch makes of the reference of attention itself."""
    inputs, tangents = drawn(shape, torch.float64, device)
    options = {"return_logsumexp": True} if operator == "softmax_attention" else {}
    function = getattr(reference, operator)
    results, moves = by_torch(lambda *x: function(*x, **MASKS[mask], **options), inputs, tangents)
    expected = (*results, *moves) if isinstance(results, tuple) else (results, moves)
    actual = getattr(reference, f"{operator}_jvp")(**inputs, **tangents, **MASKS[mask])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y.nan_to_num(0.0, neginf=-math.inf))  # torch has NaN where a row sees nothing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_shapes(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    row = next(
        row
        for row in _capability.table()
        if (row.operator, row.backend) == (f"{operator}_jvp", _capability.backend_of(device))
    )
    if max(shape.head_dim, shape.value_dim or 0) <= row.head_dim[1]:
        check(operator, shape, dtype, device)
    else:
        with pytest.raises(
            RuntimeError, match=rf"from 1 to {row.head_dim[1]} \({operator}_jvp on {row.backend}\), got"
        ):
            along(operator, *drawn(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda x: "-".join(x) or "none")
@pytest.mark.parametrize("head_dim", [64, 70, 128])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_of_wide_heads(
    operator: str, head_dim: int, wanted: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Each set of tangents, in rows that lie on 16 bytes and in others, and windows that begin at a later tile."""
    shape = Shape(length_q=70, length_k=150, head_dim=head_dim, heads=4, kv_heads=2)
    check(operator, shape, dtype, device, wanted, window=(40, 20))


@pytest.mark.parametrize("operator", OPERATORS)
def test_position_offset(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """A query that stands elsewhere sees what a window that is moved the other way shows it."""
    inputs, tangents = drawn(Shape(length_q=70, length_k=150), dtype, device)
    offset = along(operator, inputs, tangents, window=(40, 20), position_offset=-10)
    for x, y in zip(offset, along(operator, inputs, tangents, window=(50, 10)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_masks(operator: str, shape: Shape, dtype: torch.dtype, mask: str, device: torch.device) -> None:
    check(operator, shape, dtype, device, **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_each_instruction_set(
    operator: str, dtype: torch.dtype, instruction_set: str | None, device: torch.device
) -> None:
    for wanted in SUBSETS[1:]:
        check(operator, FEW_SHAPES[1], dtype, device, wanted, is_causal=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_keys_in_parts(operator: str, threads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Few rows of many keys are summed in parts, each of which measures logits from a reference of its own."""
    check(operator, Shape(length_q=3, length_k=4500, heads=1), dtype, device)
    check(operator, Shape(length_q=3, length_k=4500, heads=1), dtype, device, ("value",), window=(1500, -1))


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda x: "-".join(x) or "none")
@pytest.mark.parametrize("operator", OPERATORS)
def test_none_is_zero(operator: str, wanted: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device, wanted)
    zeros = {
        name: torch.zeros_like(inputs[name.removeprefix("tangent_")]) if x is None else x
        for name, x in tangents.items()
    }
    both = [along(operator, inputs, x, is_causal=True) for x in (tangents, zeros)]
    for x, y in zip(*both, strict=True):
        assert torch.equal(x, y)
    if not wanted:
        assert not both[0][-1].any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_is_linear_in_its_direction(operator: str, device: torch.device, dtype: torch.dtype) -> None:
    """Twice the tangents give twice the result, to the bit; and the forward is that without them."""
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device)
    once = along(operator, inputs, tangents, is_causal=True)
    twice = along(operator, inputs, {name: 2 * x for name, x in tangents.items() if x is not None}, is_causal=True)
    alone = getattr(attnx, operator)(*inputs.values(), is_causal=True)
    assert torch.equal(once[0], twice[0])
    assert_forward(once[0], alone)
    for x, y in zip(once[len(once) // 2 :], twice[len(once) // 2 :], strict=True):
        assert torch.equal(2 * x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tangents_beside_weights_near_one_half(dtype: torch.dtype, device: torch.device) -> None:
    """The tangent of a weight does not leave the range of float16 before that of the output does."""
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device, ("query", "key"))
    large = {name: x if x is None else 64 * x for name, x in tangents.items()}
    once, much = (along("sigmoid_attention", inputs, x, bias_rule="none")[1] for x in (tangents, large))
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(much, 64 * once, atol=64 * rounding, rtol=rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_logits_of_a_row_have_in_common(
    dtype: torch.dtype, device: torch.device, instruction_set: str | None
) -> None:
    """It moves the logsumexp and leaves the output where it is, however large it is."""
    inputs, tangents = drawn(Shape(length_q=70, length_k=300), dtype, device, ("query",))
    other = along("softmax_attention", inputs, tangents)
    tangents["tangent_key"] = torch.full_like(inputs["key"], 1024.0)
    one = along("softmax_attention", inputs, tangents)
    common = inputs["query"].double().sum(-1) * 1024 / 4
    rounding = 4 * torch.finfo(one[3].dtype).eps * common.abs().max()
    assert (one[3].double() - other[3].double() - common).abs().max() < rounding
    moved = (one[2].double() - other[2].double()).abs().max()
    assert moved < rounding + 2 * torch.finfo(dtype).eps * other[2].double().abs().max()


def test_rows_without_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, tangents = drawn(Shape(length_q=9, length_k=5), dtype, device)
    output, logsumexp, tangent, moved = (
        x[:, :, :4] for x in along("softmax_attention", inputs, tangents, is_causal=True)
    )
    assert not output.any()
    assert not tangent.any()
    assert not moved.any()
    assert (logsumexp == -math.inf).all()
    inputs, tangents = drawn(Shape(length_q=9, length_k=0), dtype, device)
    for operator in OPERATORS:
        assert not along(operator, inputs, tangents)[-1].any()


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("operator", OPERATORS)
def test_hidden_numbers_have_no_effect(
    operator: str, poison: float, dtype: torch.dtype, device: torch.device, instruction_set: str | None
) -> None:
    inputs, tangents = drawn(Shape(length_q=120, length_k=120), dtype, device)
    clean = along(operator, inputs, tangents, is_causal=True)
    poisoned = [x.clone() for x in (inputs["key"], inputs["value"], *tangents.values()) if x is not None]
    for x in (*poisoned[:2], *poisoned[3:]):
        x[:, :, 50:] = poison
    key, value, *rest = poisoned
    inputs |= {"key": key, "value": value}
    results = along(operator, inputs, dict(zip(tangents, rest, strict=True)), is_causal=True)
    for x, y in zip(clean, results, strict=True):
        torch.testing.assert_close(x[:, :, :50], y[:, :, :50])
        assert not y[:, :, 50:].isfinite().any()


@pytest.mark.parametrize("where", NAMES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_of_a_tangent_is_never_lost(operator: str, where: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, tangents = drawn(Shape(length_q=70, length_k=70, heads=1), dtype, device)
    x = tangents[f"tangent_{where}"]
    assert x is not None
    x[:, :, 40, 3] = math.nan
    results = along(operator, inputs, tangents)
    rows = slice(40, 41) if where == "query" else slice(None)
    half = len(results) // 2
    assert all(y.isfinite().all() for y in results[:half])
    of_row = results[half][:, :, rows]
    assert (of_row[..., 3] if where == "value" else of_row).isnan().all()
    if half == 2 and where != "value":
        assert results[3][:, :, rows].isnan().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_strides(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows lie anywhere."""
    inputs, tangents = drawn(Shape(length_q=20, length_k=30, heads=4, kv_heads=2, batch=2), dtype, device)
    expected = along(operator, inputs, tangents)
    inside = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tangents.items() if x is not None}
    for x, y in zip(expected, along(operator, inputs, inside), strict=True):
        assert torch.equal(x, y)
    turned = {name: x.mT.contiguous().mT for name, x in tangents.items() if x is not None}
    _, tangent = by_torch(getattr(attnx, operator), inputs, turned)  # make_dual has copied them
    assert torch.equal(tangent, expected[len(expected) // 2])
    one = torch.ones((), device=device, dtype=dtype).expand(inputs["query"].shape)
    _, tangent = torch.func.jvp(
        lambda q: getattr(attnx, operator)(q, inputs["key"], inputs["value"]), (inputs["query"],), (one,)
    )
    plain = along(operator, inputs, {"tangent_query": one.contiguous(), "tangent_key": None, "tangent_value": None})
    assert torch.equal(tangent, plain[len(plain) // 2])


# Torch's ways to ask ------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"is_causal": True, "scale": 0.3},
    {"window": (4, 2), "position_offset": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "window"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms(operator: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=12, length_k=15, heads=4, kv_heads=2, batch=2)
    inputs, tangents = drawn(shape, dtype, device)
    expected = along(operator, inputs, tangents, **options)[-1 if operator == "sigmoid_attention" else 2]
    arguments, directions = tuple(inputs.values()), tuple(tangents.values())

    def function(*x: Tensor) -> Tensor:
        return getattr(attnx, operator)(*x, **options)

    output, tangent = torch.func.jvp(function, arguments, directions)
    assert_forward(output, function(*arguments))
    assert torch.equal(tangent, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its folding of constants
        output, linear = torch.func.linearize(function, *arguments)
    assert torch.equal(linear(*directions), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(arguments, directions, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(function(*duals)).tangent, expected)


def test_logsumexp_has_a_tangent(dtype: torch.dtype, device: torch.device) -> None:
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device)
    _, (tangent, moved) = by_torch(lambda *x: attnx.softmax_attention(*x, return_logsumexp=True), inputs, tangents)
    expected = along("softmax_attention", inputs, tangents)
    assert torch.equal(tangent, expected[2])
    assert torch.equal(moved, expected[3])


@pytest.mark.parametrize("rule", [None, "row", 0.5])
def test_bias_of_the_sigmoid(rule: Any, dtype: torch.dtype, device: torch.device) -> None:
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device)
    _, tangent = by_torch(lambda *x: attnx.sigmoid_attention(*x, bias=rule, is_causal=True), inputs, tangents)
    exact = reference.sigmoid_attention_jvp(**inputs, **tangents, bias=rule, is_causal=True)[1]
    _, plain = by_torch(lambda *x: eager_sigmoid_attention(*x, bias=rule, is_causal=True), inputs, tangents)
    assert_close(tangent, exact, plain)


@pytest.mark.parametrize("operator", OPERATORS)
def test_jacobian(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """jacfwd is vmap over jvp."""
    inputs, _ = random_inputs(Shape(length_q=3, length_k=4, head_dim=5, heads=4, kv_heads=2, batch=2), dtype, device)
    function = getattr(attnx, operator)
    forward = torch.func.jacfwd(function, (0, 1, 2))(*inputs.values())
    backward = torch.func.jacrev(function, (0, 1, 2))(*inputs.values())
    for x, y in zip(forward, backward, strict=True):
        torch.testing.assert_close(x, y, atol=16 * torch.finfo(dtype).eps, rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("operator", OPERATORS)
def test_examples(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """jvp of vmap, and vmap of jvp, in which key and value have no examples."""
    inputs, tangents = drawn(Shape(length_q=12, length_k=15, batch=3, heads=4, kv_heads=2), dtype, device, ("query",))
    query, key, value = inputs.values()
    direction = tangents["tangent_query"]
    examples, directions = query.unflatten(0, (3, 1)), direction.unflatten(0, (3, 1))

    def function(q: Tensor) -> Tensor:
        return getattr(attnx, operator)(q, key[:1], value[:1])

    expected = torch.cat([torch.func.jvp(function, (q,), (t,))[1] for q, t in zip(examples, directions, strict=True)])
    _, one = torch.func.jvp(torch.func.vmap(function), (examples,), (directions,))
    other = torch.func.vmap(lambda q, t: torch.func.jvp(function, (q,), (t,))[1])(examples, directions)
    for x in (one, other):
        torch.testing.assert_close(x[:, 0], expected)
    last = torch.func.vmap(lambda q, t: torch.func.jvp(function, (q,), (t,))[1], in_dims=-1)
    turned = last(examples.movedim(0, -1).contiguous(), directions.movedim(0, -1).contiguous())
    torch.testing.assert_close(turned[:, 0], expected)


@pytest.mark.needs("float64")
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "window"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: str, options: dict[str, Any], device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=5, length_k=6, head_dim=3, heads=2, kv_heads=1), torch.float64, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    extra = {"return_logsumexp": True} if operator == "softmax_attention" and not options else {}
    torch.autograd.gradcheck(lambda *x: getattr(attnx, operator)(*x, **options, **extra), leaves, check_forward_ad=True)


def test_tensor_scale_has_a_tangent(dtype: torch.dtype, device: torch.device) -> None:
    """It is a factor of the query, whose tangent passes."""
    inputs, _ = drawn(FEW_SHAPES[0], dtype, device)
    scale = torch.rand(4, device=device)
    _, tangent = torch.func.jvp(
        lambda s: attnx.softmax_attention(*inputs.values(), scale=s), (scale,), (torch.ones_like(scale),)
    )
    assert tangent.abs().max() > 0


def test_factors_of_heads(dtype: torch.dtype, device: torch.device) -> None:
    """Tangents of the inputs and of the factors pass, also where a factor is 0."""
    inputs, tangents = drawn(FEW_SHAPES[0], dtype, device)
    factors, change = torch.tensor([1.0, 0, 2, 0.5], device=device), torch.tensor([1.0, 1, 0, 2], device=device)
    expected = along("softmax_attention", inputs, tangents)

    def masked(mask: Tensor, *x: Tensor) -> Any:
        return attnx.softmax_attention(*x, head_mask=mask)

    directions = [x for x in tangents.values() if x is not None]
    _, tangent = torch.func.jvp(masked, (factors, *inputs.values()), (change, *directions))
    by_heads = (x[:, None, None] for x in (factors, change))
    both = [x * y for x, y in zip(by_heads, (expected[2], expected[0]), strict=True)]
    torch.testing.assert_close(tangent, sum(both).to(dtype))


def test_results_have_gradients_beside_tangents(dtype: torch.dtype, device: torch.device) -> None:
    """While the arguments have tangents, a gradient would have one as well, and is refused."""
    inputs, _ = drawn(FEW_SHAPES[0], dtype, device)
    query, key, value = (x.requires_grad_() for x in inputs.values())
    expected = torch.autograd.grad(attnx.softmax_attention(query, key, value).float().sum(), (query, key, value))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        output, tangent = forward_ad.unpack_dual(attnx.softmax_attention(dual, key, value))
        with pytest.raises(NotImplementedError, match=r"^softmax_attention_jvp: no derivative; it is one"):
            tangent.sum().backward(retain_graph=True)
        with pytest.raises(NotImplementedError, match=r"^softmax_attention_backward: no forward-mode derivative"):
            torch.autograd.grad(output.float().sum(), (query, key, value), retain_graph=True)
    gradients = torch.autograd.grad(output.float().sum(), (query, key, value))
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x, y)


def test_second_derivatives_are_refused(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = drawn(Shape(), dtype, device)
    query, key, value = inputs.values()

    def attention(q: Tensor) -> Tensor:
        return attnx.softmax_attention(q, key, value)

    def along_itself(q: Tensor) -> Tensor:
        return torch.func.jvp(attention, (q,), (torch.ones_like(q),))[1]

    with pytest.raises(NotImplementedError, match=r"^softmax_attention_jvp: no forward-mode derivative, got a tangent"):
        torch.func.jvp(along_itself, (query,), (query,))
    with pytest.raises(NotImplementedError, match=r"^softmax_attention_jvp: no derivative"):
        torch.func.grad(lambda q: along_itself(q).float().sum())(query)
    with pytest.raises(NotImplementedError, match=r"^softmax_attention_backward: no forward-mode derivative"):
        torch.func.jvp(torch.func.grad(lambda q: attention(q).float().sum()), (query,), (query,))


BESIDE: dict[str, Any] = {
    "alibi_slopes": torch.rand(2),
    "softcap": 3.0,
    "attn_mask": torch.rand(33, 33) < 0.5,
    "key_bias": torch.rand(1, 2, 33),
    "key_mask": torch.rand(1, 2, 33),
    "distance_bias": torch.rand(1, 2, 65),
    "row_bounds": torch.zeros(1, 1, 33, 2, dtype=torch.int32),
    "seqused_k": torch.tensor([20], dtype=torch.int32),
    "sink": torch.rand(2),
    "bias": torch.rand(2),
    "dropout_p": 0.5,
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_tangents_do_not_pass_beside_is_named(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = drawn(Shape(), dtype, device)
    query, key, value = inputs.values()
    x = BESIDE[name]
    if isinstance(x, Tensor):
        x = x.to(device, torch.float64 if dtype == torch.float64 and x.is_floating_point() else x.dtype)
    function = attnx.sigmoid_attention if name == "bias" else attnx.softmax_attention
    options = {name: x} | ({"seed": 1, "offset": 2} if name == "dropout_p" else {})
    message = rf"^{function.__name__}: no forward-mode derivative beside .*{name}.*, got a tangent of query; it takes "
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda q: function(q, key, value, **options), (query,), (query,))


def test_packed_sequences_are_refused(dtype: torch.dtype, device: torch.device) -> None:
    x, ends = (
        torch.randn(20, 2, 16, device=device).to(dtype),
        torch.tensor([0, 8, 20], dtype=torch.int32, device=device),
    )
    with pytest.raises(
        NotImplementedError, match=r"^softmax_attention_varlen: no forward-mode derivative, got a tangent"
    ):
        torch.func.jvp(lambda q: attnx.softmax_attention_varlen(q, x, x, ends, ends, 12, 12), (x,), (x,))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (
        {"tangent_query": torch.zeros(1, 2, 33, 8)},
        r"tangent_query: expected the shape of query, \(1, 2, 33, 16\)",
    ),
    "rank": ({"tangent_key": torch.zeros(2, 33, 16)}, r"tangent_key: expected the shape of key, .*, got \(2, 33, 16\)"),
    "heads": ({"tangent_value": torch.zeros(1, 4, 33, 16)}, r"tangent_value: expected the shape of value"),
    "dtype": (
        {"tangent_key": torch.zeros(1, 2, 33, 16, dtype=torch.int32)},
        "tangent_key: expected .* like query, got int32",
    ),
    "layout": ({"tangent_value": torch.zeros(1, 2, 16, 33).mT}, "tangent_value: expected a contiguous last dimension"),
    "device": (
        {"tangent_query": torch.zeros(1, 2, 33, 16, device="meta")},
        "tangent_query: expected a tensor on .* like query",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_tangents_are_named(
    operator: str, given: dict[str, Tensor], message: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, tangents = drawn(Shape(), dtype, device)
    given = {
        name: x if x.device.type == "meta" else x.to(device, dtype if x.is_floating_point() else x.dtype)
        for name, x in given.items()
    }
    with pytest.raises(RuntimeError, match=f"^{message}"):
        along(operator, inputs, tangents | given)


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda x: "-".join(x) or "none")
@pytest.mark.parametrize("operator", OPERATORS)
def test_flops(operator: str, wanted: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A tangent that is None has no product."""
    inputs, tangents = drawn(Shape(length_q=20, length_k=30, head_dim=16, value_dim=8), dtype, device, wanted)
    with FlopCounterMode(display=False) as counter:
        along(operator, inputs, tangents)
    of_logits = len({"query", "key"} & set(wanted))
    features = 16 * (1 + of_logits) + 8 * (1 + (of_logits > 0) + ("value" in wanted))
    assert counter.get_total_flops() == 2 * 2 * 20 * 30 * features


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = drawn(Shape(), dtype, device)
    query, key, value = inputs.values()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)
        told = attnx.explain(attnx.softmax_attention, dual, key, value)
        assert told.supported
        assert told.operator == "softmax_attention_jvp"
        told = attnx.explain(attnx.softmax_attention, dual, key, value, softcap=3.0)
        assert not told.supported
        assert "missing: softcap" in str(told)
        mask = attnx.BlockMask.causal(33, device=device)
        assert not attnx.explain(attnx.block_sparse_attention, dual, key, value, mask).supported


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    """A compiled program enters the dual level without telling Python of it."""
    inputs, tangents = drawn(Shape(), torch.float32, CPU)
    query, key, value = inputs.values()

    def along_a_product(q: Tensor, t: Tensor) -> Any:
        return torch.func.jvp(lambda q: attnx.softmax_attention(q, key, value, is_causal=True) * q, (q,), (t,))

    compiled = torch.compile(along_a_product, backend="aot_eager", fullgraph=True)
    assert tangents["tangent_query"] is not None
    for x, y in zip(*(f(query, tangents["tangent_query"]) for f in (compiled, along_a_product)), strict=True):
        assert torch.equal(x, y)
    refused = torch.compile(
        lambda q: torch.func.jvp(lambda q: attnx.softmax_attention(q, key, value, softcap=3.0) * q, (q,), (q,)),
        backend="aot_eager",
    )
    with pytest.raises(NotImplementedError, match=r"^softmax_attention: no forward-mode derivative beside softcap"):
        refused(query)


@pytest.mark.backends("cpu")
def test_autocast(backend: object) -> None:
    inputs, tangents = drawn(Shape(), torch.float32, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        output, tangent = by_torch(attnx.softmax_attention, inputs, tangents)
    assert output.dtype == tangent.dtype == torch.bfloat16
