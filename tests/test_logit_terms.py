"""What is done or added to a logit: softcap, masks of pairs, biases and shares of keys, and dropout of weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from backends import Backend
from cases import DTYPES, MASKS, OPERATORS, Shape, pack, parameter_dtype, random_inputs, random_parameter
from compare import forward_backward
from logit_terms import GRADIENTS, check, draw_term, eager, generator, needs, terms_of

SHAPES = [
    Shape(length_q=65, length_k=65, batch=2, heads=4, kv_heads=2),
    Shape(length_q=40, length_k=130, head_dim=40, value_dim=24, batch=2, heads=3),
    Shape(length_q=130, length_k=37, head_dim=3, heads=4, kv_heads=1),
    Shape(length_q=2, length_k=150, head_dim=64, heads=4, kv_heads=2),
]
ALONE = ["softcap", "bool_mask", "input_mask", "attn_mask", "distance_bias", "row_bounds", "key_bias", "key_mask"]
ALONE += ["dropout"]
TOGETHER = [("softcap", "attn_mask"), ("softcap", "bool_mask", "key_bias", "key_mask", "dropout")]
COMBINATIONS = [(name,) for name in ALONE] + TOGETHER + [("row_bounds", *TOGETHER[1])]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_definition(names: tuple[str, ...], shape: Shape, dtype: torch.dtype, operator: str, backend: Backend) -> None:
    needs(backend, names)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    check(operator, inputs, grad_output, **terms_of(names, shape, dtype, backend.device))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "window_diagonal"])
def test_bounds(mask: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """But for one key a row, whose gradient under softmax is rounding alone."""
    names = ("attn_mask", "key_bias")
    needs(backend, names)
    shape = Shape(length_q=70, length_k=130, heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    slopes = {"alibi_slopes": random_parameter((2,), dtype, backend.device)}
    check(operator, inputs, grad_output, **terms_of(names, shape, dtype, backend.device), **MASKS[mask])
    check(operator, inputs | slopes, grad_output, **terms_of(names, shape, dtype, backend.device), **MASKS[mask])


@pytest.mark.parametrize("names", [("key_mask", "key_bias"), TOGETHER[1]], ids="-".join)
def test_with_a_sink(names: tuple[str, ...], dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, names)
    shape = Shape(length_q=70, length_k=40, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs["sink"] = random_parameter((4,), dtype, backend.device) * 8
    check("softmax_attention", inputs, grad_output, **terms_of(names, shape, dtype, backend.device))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["attn_mask", "distance_bias", "key_bias", "key_mask"])
@pytest.mark.parametrize("served", ["sequences", "heads", "all", "rows"])
def test_one_number_for_several(
    served: str, name: str, operator: str, dtype: torch.dtype, backend: Backend, deterministic: None
) -> None:
    """The gradient is the sum over what shares a number, in the same bits every time."""
    needs(backend, (name,))
    shape = Shape(length_q=70, length_k=130, batch=2, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    terms = {name: draw_term(name, shape, dtype, backend.device, served)}
    first, second = (check(operator, inputs, grad_output, **terms) for _ in range(2))
    assert all(torch.equal(first[x], second[x]) for x in first)


@pytest.mark.parametrize("served", ["each", "all", "rows", "heads", "sequences"])
def test_threads_share_the_work(served: str, threads: int, device: torch.device, backend: Backend) -> None:
    needs(backend, GRADIENTS)
    shape = Shape(length_q=300, length_k=130, head_dim=64, batch=2, heads=4, kv_heads=2)
    dtype = backend.dtypes()[0]
    inputs, grad_output = random_inputs(shape, dtype, device)
    terms = {name: draw_term(name, shape, dtype, device, served) for name in GRADIENTS}
    check("softmax_attention", inputs, grad_output, **terms)
    needs(backend, ("distance_bias",))
    terms["distance_bias"] = draw_term("distance_bias", shape, dtype, device, served)
    del terms["attn_mask"]
    check("softmax_attention", inputs, grad_output, **terms)


def test_no_sum_of_many_heads_is_lost(threads: int, device: torch.device, backend: Backend) -> None:
    """All heads add to the same numbers of a mask's gradient for so long that threads would meet there."""
    needs(backend, ("attn_mask",))
    shape = Shape(length_q=500, length_k=500, head_dim=8, heads=16)
    inputs, grad_output = random_inputs(shape, backend.dtypes()[0], device)
    inputs["attn_mask"] = draw_term("attn_mask", shape, backend.dtypes()[0], device, "all")
    several = forward_backward(attnx.softmax_attention, inputs, grad_output)
    torch.set_num_threads(1)  # the fixture sets it back
    one = forward_backward(attnx.softmax_attention, inputs, grad_output)
    assert torch.equal(several["grad_attn_mask"], one["grad_attn_mask"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_varlen(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """Terms of keys are packed as keys are, and draws count sequences and their own queries."""
    names = ("softcap", "key_bias", "key_mask", "dropout")
    needs(backend, names)
    inputs, grad_output, sizes = pack(([70, 0, 9, 30], [80, 7, 0, 30]), dtype, backend.device)
    draw = {"softcap": 2.0, "dropout_p": 0.4, "seed": 3, "offset": 2}
    terms = {name: draw_term(name, Shape(length_k=117, heads=4), dtype, backend.device)[0] for name in names[1:3]}
    leaves = inputs | terms
    results = forward_backward(getattr(attnx, f"{operator}_varlen"), leaves, grad_output, **sizes, **draw)
    exact = {name: x.double() for name, x in leaves.items()}
    expected = forward_backward(getattr(reference, f"{operator}_varlen"), exact, grad_output.double(), **sizes, **draw)
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    for name, x in results.items():
        torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_block_sparse(score: str, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
    names = ("softcap", "attn_mask", "key_bias", "key_mask", "dropout")
    rows = [row for row in attnx._capability.table() if row.operator == "block_sparse_attention"]
    (row,) = (row for row in rows if row.backend == backend.kernels)
    if not {*names, "attn_mask_gradient"} <= set(row.features):
        pytest.skip("the capability table has not all of them for lists")
    shape = Shape(batch=2, length_q=200, length_k=330, heads=4, kv_heads=2)
    visited = torch.rand(1, 4, 4, 6, generator=generator()) < 0.6
    mask = attnx.BlockMask.from_dense(visited.to(device))
    inputs, grad_output = random_inputs(shape, dtype, device)
    for served in ("each", "all"):
        terms = terms_of(names, shape, dtype, device, served)
        leaves = inputs | {name: terms.pop(name) for name in GRADIENTS}
        options = {"block_mask": mask, "score": score, "is_causal": True, **terms}
        results = forward_backward(attnx.block_sparse_attention, leaves, grad_output, **options)
        exact = {name: x.double() for name, x in leaves.items()}
        expected = forward_backward(reference.block_sparse_attention, exact, grad_output.double(), **options)
        tolerance = {torch.float32: 2e-5}.get(dtype, 3e-2)
        for name, x in results.items():
            atol = tolerance * max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(x.double(), expected[name], rtol=tolerance, atol=atol, msg=name)


NEUTRAL = {
    "softcap": {"softcap": math.inf},
    "bool_mask": {"attn_mask": lambda pairs, keys, kind: torch.ones(pairs, dtype=torch.bool)},
    "attn_mask": {"attn_mask": lambda pairs, keys, kind: torch.zeros(pairs, dtype=kind)},
    "distance_bias": {
        "distance_bias": lambda pairs, keys, kind: torch.zeros(1, keys[1], pairs[2] + pairs[3] - 1, dtype=kind)
    },
    "row_bounds": {"row_bounds": lambda pairs, keys, kind: torch.tensor([[[[0, 130]]]], dtype=torch.int32)},
    "key_bias": {"key_bias": lambda pairs, keys, kind: torch.zeros(keys, dtype=kind)},
    "key_mask": {"key_mask": lambda pairs, keys, kind: torch.ones(keys, dtype=kind)},
    "dropout": {"dropout_p": 0.0},
    "rounded_to_no_dropout": {"dropout_p": 1e-3, "seed": 1, "offset": 2},
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_terms(name: str, operator: str, dtype: torch.dtype, backend: Backend, deterministic: None) -> None:
    """They give the plain call bit for bit; but on CUDA, where a term that is there takes another loop, to rounding."""
    needs(backend, ({"rounded_to_no_dropout": "dropout"}.get(name, name),), gradients=False)
    shape = Shape(length_q=70, length_k=130, head_dim=64, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    pairs, keys, kind = (1, 1, 70, 130), (1, 1, 130), parameter_dtype(dtype)
    terms = {
        argument: x(pairs, keys, kind).to(backend.device) if callable(x) else x for argument, x in NEUTRAL[name].items()
    }
    plain = forward_backward(getattr(attnx, operator), inputs, grad_output, is_causal=True)
    with_term = forward_backward(getattr(attnx, operator), inputs, grad_output, is_causal=True, **terms)
    for x in plain:
        if backend.kernels == "cuda" and name not in ("softcap", "dropout"):
            rounding = 4 * torch.finfo(dtype).eps
            atol = rounding * float(plain[x].abs().max())
            torch.testing.assert_close(with_term[x], plain[x], rtol=rounding, atol=atol, msg=x)
        else:
            assert torch.equal(plain[x], with_term[x]), x


def test_a_large_softcap_is_none(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("softcap",))
    shape = Shape(length_q=70, length_k=130, head_dim=64)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    check("softmax_attention", inputs, grad_output, softcap=1e6)
    exact = {name: x.double() for name, x in inputs.items()}
    for c in (3.0, 1e4, 1e8):
        expected = reference.softmax_attention(**exact, softcap=c)
        assert_close(
            attnx.softmax_attention(**inputs, softcap=c), expected, eager(**inputs, score="softmax", softcap=c)
        )


@pytest.mark.parametrize("kind", ["bool_mask", "attn_mask", "key_mask", "key_bias"])
def test_rows_that_see_nothing(kind: str, dtype: torch.dtype, backend: Backend, poisoned_allocations: None) -> None:
    """Output 0, a logsumexp of -inf or of the sink, and no gradient; nothing is NaN."""
    needs(backend, (kind,))
    shape = Shape(length_q=70, length_k=130, heads=2, batch=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    term = draw_term(kind, shape, dtype, backend.device)
    hidden = {"bool_mask": False, "attn_mask": -math.inf, "key_mask": 0.0, "key_bias": -math.inf}[kind]
    rows = (
        (slice(1, 2), slice(None), slice(5, 60)) if kind.endswith("n_mask") or kind == "bool_mask" else (slice(1, 2),)
    )
    term[rows] = hidden
    argument = {"bool_mask": "attn_mask"}.get(kind, kind)
    seen = torch.zeros(2, 2, 70, dtype=torch.bool)
    seen[rows[:3]] = True
    for sinks in (None, torch.ones(2, dtype=parameter_dtype(dtype), device=backend.device)):
        leaves = inputs if kind == "bool_mask" else inputs | {argument: term}
        options: dict[str, Any] = {argument: term} if kind == "bool_mask" else {}
        results = forward_backward(attnx.softmax_attention, leaves, grad_output, sink=sinks, **options)
        assert all(bool(x.isfinite().all()) for x in results.values())
        assert (results["output"][seen] == 0).all()
        assert (results["grad_query"][seen] == 0).all()
        _, logsumexp = attnx.softmax_attention(**leaves, sink=sinks, return_logsumexp=True, **options)
        expected = -math.inf if sinks is None else 1.0
        assert (logsumexp[seen] == expected).all()
        assert logsumexp[~seen].isfinite().all()


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["bool_mask", "attn_mask", "key_mask", "key_bias"])
@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_what_is_hidden_does_not_leak(
    worst: float, kind: str, operator: str, dtype: torch.dtype, backend: Backend
) -> None:
    needs(backend, (kind, "softcap"))
    shape = Shape(length_q=70, length_k=130, heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    term = draw_term(kind, shape, dtype, backend.device)
    hidden = {"bool_mask": False, "attn_mask": -math.inf, "key_mask": 0.0, "key_bias": -math.inf}[kind]
    term[..., 20:30] = hidden
    argument = {"bool_mask": "attn_mask"}.get(kind, kind)
    options = {argument: term, "softcap": 2.0}
    clean = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    inputs["key"][:, :, 20:30] = worst
    inputs["value"][:, :, 20:30] = worst
    spoilt = forward_backward(getattr(attnx, operator), inputs, grad_output, **options)
    for name in clean:
        torch.testing.assert_close(spoilt[name], clean[name], msg=name)
    for name in ("grad_key", "grad_value"):
        assert (spoilt[name][:, :, 20:30] == 0).all()


@pytest.mark.needs("hidden_nonfinite")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_learned_share_of_0_does_not_leak(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    """A hidden key is visited for the gradient of its own share, and for no other."""
    needs(backend, ("key_mask",))
    shape = Shape(length_q=70, length_k=130, heads=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs["key_mask"] = draw_term("key_mask", shape, dtype, backend.device)
    inputs["key_mask"][..., 20:30] = 0
    clean = forward_backward(getattr(attnx, operator), inputs, grad_output)
    inputs["key"][:, :, 20:30] = math.nan
    inputs["value"][:, :, 20:30] = math.nan
    spoilt = forward_backward(getattr(attnx, operator), inputs, grad_output)
    for name in clean:
        part = [x[name] if name in ("output", "grad_query") else x[name][..., :20] for x in (spoilt, clean)]
        if name in ("grad_key", "grad_value"):
            part = [x[name][:, :, 30:] for x in (spoilt, clean)]
        torch.testing.assert_close(*part, msg=name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_of_masks(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("attn_mask", "bool_mask"), gradients=False)
    shape = Shape(length_q=70, length_k=130, heads=2, batch=2)
    inputs, _ = random_inputs(shape, dtype, backend.device)
    attend = getattr(attnx, operator)
    for kind in ("bool_mask", "input_mask", "attn_mask"):
        mask = draw_term(kind, shape, dtype, backend.device)
        expected = attend(**inputs, attn_mask=mask)
        wide = torch.stack((mask, mask), -1)[..., 0]
        for same in (mask.mT.contiguous().mT, mask.transpose(0, 2).contiguous().transpose(0, 2), wide):
            assert torch.equal(attend(**inputs, attn_mask=same), expected)
        row = mask[:1, :1, :1]
        expanded = attend(**inputs, attn_mask=row.expand(2, 2, 70, 130))
        assert torch.equal(expanded, attend(**inputs, attn_mask=row[0, 0]))


def test_bool_shares(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("key_mask",), gradients=False)
    inputs, _ = random_inputs(Shape(), dtype, backend.device)
    share = (torch.rand(1, 1, 33, generator=generator()) < 0.5).to(backend.device)
    as_numbers = attnx.softmax_attention(**inputs, key_mask=share.to(parameter_dtype(dtype)))
    assert torch.equal(attnx.softmax_attention(**inputs, key_mask=share), as_numbers)


# Dropout ------------------------------------------------------------------------------------------------------------


def test_dropout_keeps_its_share(dtype: torch.dtype, backend: Backend) -> None:
    """Values of 1 make the output the sum of the weights that are kept: 1 on average."""
    needs(backend, ("dropout",))
    inputs, _ = random_inputs(Shape(length_q=256, length_k=512, heads=4), dtype, backend.device)
    inputs["value"] = torch.ones_like(inputs["value"])
    output = attnx.softmax_attention(**inputs, dropout_p=0.5, seed=1, offset=0, scale=0.0).float()
    assert abs(output.mean() - 1) < 0.01
    # The number of kept keys is binomial: its deviation is a share of 1 / sqrt(512) of its mean.
    assert 0.7 < output[..., 0].std() * 512**0.5 < 1.3


def test_dropout_draws_anew(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("dropout",))
    inputs, _ = random_inputs(Shape(), dtype, backend.device)

    def attend(**draw: Any) -> Tensor:
        return attnx.softmax_attention(**inputs, dropout_p=0.5, **draw)

    same = attend(seed=1, offset=2), attend(seed=1, offset=2)
    assert torch.equal(*same)
    number = torch.tensor(1, device=backend.device), torch.tensor(2, device=backend.device)
    assert torch.equal(same[0], attend(seed=number[0], offset=number[1]))
    others = [attend(seed=2, offset=2), attend(seed=1, offset=3), attend(), attend()]
    assert all(not torch.equal(x, y) for i, x in enumerate([same[0], *others]) for y in others[i:])
    torch.manual_seed(7)
    first = attend()
    torch.manual_seed(7)
    assert torch.equal(first, attend())


def test_vmap_of_dropout_is_each_call(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("dropout",))
    inputs, _ = random_inputs(Shape(batch=2), dtype, backend.device)
    seeds = torch.tensor([3, 4], device=backend.device)
    offset = torch.tensor(0, device=backend.device)

    def attend(seed: Tensor) -> Tensor:
        return attnx.softmax_attention(**inputs, dropout_p=0.5, seed=seed, offset=offset)

    assert torch.equal(torch.vmap(attend)(seeds), torch.stack([attend(seed) for seed in seeds]))


# Torch --------------------------------------------------------------------------------------------------------------


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("served", ["each", "all", "rows"])
def test_gradcheck(served: str, operator: str, device: torch.device) -> None:
    shape = Shape(length_q=5, length_k=7, head_dim=3, batch=2, heads=2, kv_heads=1)
    inputs, _ = random_inputs(shape, torch.float64, device)
    terms = {name: draw_term(name, shape, torch.float64, device, served) for name in GRADIENTS}
    terms["attn_mask"] = torch.randn(terms["attn_mask"].shape, dtype=torch.float64)
    terms["key_mask"] = torch.rand(terms["key_mask"].shape, dtype=torch.float64) * 0.8 + 0.1
    leaves = [x.requires_grad_() for x in (inputs | terms).values()]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, share: Tensor) -> Tensor:
        draw: dict[str, Any] = {"dropout_p": 0.3, "seed": 5, "offset": 1, "is_causal": True, "softcap": 1.5}
        return getattr(attnx, operator)(query, key, value, attn_mask=mask, key_bias=bias, key_mask=share, **draw)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("softcap", *GRADIENTS, "dropout"))
    shape = Shape(length_q=20, length_k=30, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, backend.device)
    mask, bias, share = (draw_term(name, shape, dtype, backend.device, "all").requires_grad_() for name in GRADIENTS)
    seed, offset = torch.tensor(1, device=backend.device), torch.tensor(2, device=backend.device)
    parameters = (None, None, "none", 0.0) if operator.startswith("sigmoid") else (None, None)
    leaves = [x.requires_grad_() for x in inputs.values()]
    bounds = draw_term("row_bounds", shape, dtype, backend.device, "all")
    distances = draw_term("distance_bias", shape, dtype, backend.device, "all").requires_grad_()
    full = (mask, None, bounds, 2.0, bias, share, 0.3, seed, offset)
    for terms in (full, (None, distances, *full[2:]), (mask > 0, None, None, None, None, None, 0.0, None, None)):
        arguments = (*leaves, None, None, *parameters, *terms, None, True, -1, -1, 0)
        torch.library.opcheck(getattr(torch.ops.attnx, operator).default, arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compile_and_vmap(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("softcap", *GRADIENTS), gradients=False)
    shape = Shape(length_q=20, length_k=30, batch=2, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, backend.device)
    attend = getattr(attnx, operator)
    terms = {name: draw_term(name, shape, dtype, backend.device, "all") for name in GRADIENTS} | {"softcap": 2.0}
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, **terms), attend(**inputs, **terms))
    masks = torch.stack([terms.pop("attn_mask"), torch.zeros(1, 1, 20, 30, device=backend.device)])
    masks = masks.to(parameter_dtype(dtype))
    each = torch.stack([attend(**inputs, **terms, attn_mask=mask) for mask in masks])
    assert torch.equal(torch.vmap(lambda mask: attend(**inputs, **terms, attn_mask=mask))(masks), each)


def test_compile_draws_anew(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("dropout",))
    inputs, _ = random_inputs(Shape(), dtype, backend.device)
    compiled = torch.compile(attnx.softmax_attention, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(**inputs, dropout_p=0.5), compiled(**inputs, dropout_p=0.5))
    draw: dict[str, Any] = {"dropout_p": 0.5, "seed": 3, "offset": 4}
    assert torch.equal(compiled(**inputs, **draw), attnx.softmax_attention(**inputs, **draw))


def test_gradients_of_each_sample(dtype: torch.dtype, backend: Backend) -> None:
    """vmap(grad) over examples that share a mask or have their own."""
    needs(backend, GRADIENTS)
    shape = Shape(length_q=9, length_k=11, heads=4, kv_heads=2)
    samples = [torch.stack((x, x.flip(-1))) for x in random_inputs(shape, dtype, backend.device)[0].values()]
    mask, bias, share = (draw_term(name, shape, dtype, backend.device, "all") for name in GRADIENTS)

    def loss(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        output = attnx.softmax_attention(query, key, value, attn_mask=mask, key_bias=bias, key_mask=share)
        return output.float().square().sum()

    gradient = torch.func.grad(loss, (0, 1, 2, 3, 4))
    biases = torch.stack((bias, bias / 2))
    several = torch.func.vmap(gradient, in_dims=(0, 0, 0, None, 0))(*samples, mask, biases)
    for i in range(2):
        for x, y in zip(several, gradient(*(x[i] for x in samples), mask, biases[i]), strict=True):
            torch.testing.assert_close(x[i], y)


# Refusals -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mask_shape": (
        {"attn_mask": torch.zeros(2, 3, 5, 6)},
        r"attn_mask: expected shape \(2 or 1, 4 or 1, 5 or 1, 6\), sequences, query heads, queries and keys, "
        r"got \(2, 3, 5, 6\)",
    ),
    "mask_keys": ({"attn_mask": torch.zeros(5, 2)}, r"attn_mask: expected shape .*, got \(1, 1, 5, 2\)"),
    "mask_rank": ({"attn_mask": torch.zeros(6)}, r"attn_mask: expected 2 to 4 dimensions, .* got shape \(6,\)"),
    "mask_dtype": (
        {"attn_mask": torch.zeros(5, 6, dtype=torch.int32)},
        "attn_mask: expected bool, .* like query, or float32, got int32",
    ),
    "mask_type": ({"attn_mask": 3}, "attn_mask: expected a tensor, got 3"),
    "bias_shape": (
        {"key_bias": torch.zeros(2, 4, 5)},
        r"key_bias: expected shape \(2 or 1, 4 or 1, 6\), sequences, query heads and keys, got \(2, 4, 5\)",
    ),
    "bias_rank": ({"key_bias": torch.zeros(4, 6)}, r"key_bias: expected shape .*, got \(4, 6\)"),
    "bias_dtype": (
        {"key_bias": torch.zeros(2, 4, 6, dtype=torch.int32)},
        r"key_bias: expected float32 \(the type of the sums\), got int32",
    ),
    "bias_strides": ({"key_bias": torch.zeros(2, 4, 12)[..., ::2]}, "key_bias: expected a contiguous last dimension"),
    "share_above": (
        {"key_mask": torch.full((1, 1, 6), 1.5)},
        "key_mask: expected numbers from 0 to 1, got 1.5 at key 0",
    ),
    "share_below": ({"key_mask": torch.full((1, 1, 6), -0.1)}, "key_mask: expected numbers from 0 to 1, got -0.1"),
    "share_nan": ({"key_mask": torch.full((1, 1, 6), math.nan)}, "key_mask: expected numbers from 0 to 1, got .*nan"),
    "no_softcap": ({"softcap": 0.0}, "softcap: expected None or a number above 0, got 0"),
    "negative_softcap": ({"softcap": -2.0}, "softcap: expected None or a number above 0, got -2"),
    "nan_softcap": ({"softcap": math.nan}, "softcap: expected None or a number above 0, got nan"),
    "tiny_softcap": ({"softcap": 1e-35}, "softcap: expected a number from 1e-30 to 1e30, or inf for none, got 1e-35"),
    "text_softcap": ({"softcap": "50"}, "softcap: expected None or a number above 0, got '50'"),
    "all_dropped": ({"dropout_p": 1.0}, "dropout_p: expected a probability from 0 to below 1, got 1.0"),
    "negative_dropout": ({"dropout_p": -0.1}, "dropout_p: expected a probability from 0 to below 1, got -0.1"),
    "nan_dropout": ({"dropout_p": math.nan}, "dropout_p: expected a probability from 0 to below 1, got nan"),
    "seed_alone": ({"dropout_p": 0.1, "seed": 1}, "offset: expected one with seed, got None"),
    "seed_dtype": (
        {"dropout_p": 0.1, "seed": torch.tensor(1.0), "offset": 1},
        "seed: expected int64, got float32",
    ),
    "offset_range": (
        {"dropout_p": 0.1, "seed": 1, "offset": 2**32},
        "offset: expected an int from 0 to 4294967295, got 4294967296",
    ),
}
FEATURES = {"attn_mask": "attn_mask", "key_bias": "key_bias", "key_mask": "key_mask", "softcap": "softcap"}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", BAD)
def test_bad_terms(name: str, operator: str, dtype: torch.dtype, backend: Backend) -> None:
    arguments, message = BAD[name]
    needs(backend, tuple({FEATURES.get(x, "dropout") for x in arguments}), gradients=False)
    inputs, _ = random_inputs(Shape(5, 6, batch=2, heads=4, kv_heads=2), dtype, backend.device)
    placed = {n: x.to(backend.device) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        getattr(attnx, operator)(**inputs, **placed)


@pytest.mark.parametrize("name", ["attn_mask", "key_bias", "key_mask"])
def test_nested_tensors_have_none(name: str, dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 4)], layout=torch.jagged, dtype=dtype)
    nested = rows.to(device).transpose(1, 2)
    with pytest.raises(RuntimeError, match=f"{name}: expected None with nested tensors, got a tensor of shape"):
        attnx.softmax_attention(nested, nested, nested, **{name: torch.zeros(1, 1, 4, device=device)})


def test_nested_softcap_and_dropout(dtype: torch.dtype, backend: Backend) -> None:
    needs(backend, ("softcap", "dropout"))
    each = [torch.randn(n, 2, 8).to(backend.device, dtype) for n in (3, 40)]
    nested = torch.nested.nested_tensor(each, layout=torch.jagged).transpose(1, 2)
    draw: dict[str, Any] = {"softcap": 2.0, "dropout_p": 0.5, "seed": 1, "offset": 2}
    output = attnx.softmax_attention(nested, nested, nested, **draw).transpose(1, 2).unbind()
    first = each[0].transpose(0, 1)[None]
    assert torch.equal(output[0], attnx.softmax_attention(first, first, first, **draw)[0].transpose(0, 1))


def test_refused_where_the_table_has_none(dtype: torch.dtype, device: torch.device, monkeypatch: Any) -> None:
    """Ahead of the forward, also where the gradient alone is missing."""
    inputs, _ = random_inputs(Shape(), dtype, device)
    mask = torch.zeros(33, 33, device=device, dtype=parameter_dtype(dtype), requires_grad=True)
    row = attnx._capability.table()[0]
    without = [
        attnx._capability.Capability(
            x.operator, x.backend, x.dtypes, x.head_dim, tuple(f for f in x.features if "mask" not in f), x.backward
        )
        for x in attnx._capability.table()
    ]
    assert row.operator == "sigmoid_attention"
    monkeypatch.setattr(attnx._capability, "table", lambda: without)
    with pytest.raises(
        NotImplementedError, match=r"(?s)^softmax_attention: no kernel.*missing: +attn_mask, attn_mask_gradient$"
    ):
        attnx.softmax_attention(**inputs, attn_mask=mask)
