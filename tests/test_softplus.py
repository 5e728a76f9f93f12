"""Softplus attention, plain and sharpened: definition, gradients, rows without weights, lengths, the module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.nn import SoftplusAttention
from attnx.testing import assert_close
from cases import DTYPES, MASKS, Shape, pack, parameter_dtype, random_inputs, visible_pairs
from compare import each_sequence, forward_backward, used_keys

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

SHAPES = [
    Shape(),
    Shape(length_q=65, length_k=65, batch=2, heads=4, kv_heads=2),
    Shape(length_q=40, length_k=230, head_dim=40, value_dim=24, batch=2, heads=3),
    Shape(length_q=300, length_k=7, head_dim=3, heads=2),
    Shape(length_q=1, length_k=200, head_dim=64, heads=4, kv_heads=1),
    Shape(length_q=200, length_k=300, head_dim=256, value_dim=130),
]
POWERS = [None, 2, 3, 15]


def unit(x: Tensor) -> Tensor:
    return (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)).to(x.dtype)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sharpen: int | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Any = None,
    position_offset: int = 0,
    constant_sums: bool = False,
) -> Tensor:
    """Plain PyTorch in the dtype of ``query``, every sum from the last term to the first."""
    groups = query.shape[1] // key.shape[1]
    visible = reference._visible(
        reference._distance(query.shape[2], key.shape[2], query.device) + position_offset, is_causal, window
    )
    keys = visible.sum(-1, keepdim=True)
    scale = math.log(query.shape[-1]) if scale is None else scale
    if isinstance(scale, Tensor):
        scale = scale.expand(query.shape[1])[:, None, None]
    rows = (unit(query) * (scale * keys.clamp(min=1).to(parameter_dtype(query.dtype)).log())).to(query.dtype)
    logits = rows.flip(-1) @ unit(key).flip(-1).repeat_interleave(groups, 1).mT
    a = logits.logaddexp(torch.zeros_like(logits)).masked_fill(~visible, 0.0)
    total = a.flip(-1).sum(-1, keepdim=True)
    if constant_sums:
        total = total.detach()
    weights = a / total.where(total > 0, 1.0)
    if sharpen is not None:
        above = keys * weights - (keys > 3).to(weights.dtype)
        rounding = 1e-12 if query.dtype == torch.float64 else 0.0
        above = above.where(visible & (above > rounding), 0.0)
        most = above.amax(-1, keepdim=True).detach() if above.shape[-1] else total
        powers = (above / most.where(most > 0, 1.0)) ** sharpen
        total = powers.flip(-1).sum(-1, keepdim=True)
        weights = powers / (total.detach() if constant_sums else total).where(most > 0, 1.0)
    return weights.flip(-1) @ value.flip(2).repeat_interleave(groups, 1)


def check(
    inputs: dict[str, Tensor], grad_output: Tensor, name: str = "softplus_attention", **options: Any
) -> dict[str, Tensor]:
    plain = each_sequence(eager) if name.endswith("varlen") else used_keys(eager)
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    actual = forward_backward(getattr(attnx, name), inputs, grad_output, **options)
    expected = forward_backward(getattr(reference, name), *exact, **options)
    baseline = forward_backward(plain, inputs, grad_output, **options)
    terms = forward_backward(plain, *exact, **options, constant_sums=True)
    # A power multiplies the relative rounding of its base, which plain PyTorch may be lucky with.
    power = options.get("sharpen") or 1
    units = {16: 2.0, 32: 8.0, 64: 16.0}[torch.finfo(grad_output.dtype).bits]
    floor = units * power if power > 3 else units
    for of, x in actual.items():
        sizes = terms[of] if of.startswith("grad_") else None
        assert_close(x, expected[of], baseline[of], terms=sizes, floor=floor, name=of, dtype=grad_output.dtype)
    return actual


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sharpen", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: Shape, dtype: torch.dtype, sharpen: int | None, mask: str, device: torch.device) -> None:
    check(*random_inputs(shape, dtype, device), sharpen=sharpen, **MASKS[mask])


@pytest.mark.parametrize("sharpen", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(
    dtype: torch.dtype, sharpen: int | None, instruction_set: str | None, device: torch.device
) -> None:
    shape = Shape(length_q=150, length_k=200, head_dim=24, batch=2, heads=4, kv_heads=2)
    check(*random_inputs(shape, dtype, device), sharpen=sharpen, is_causal=True, position_offset=-20)


@pytest.mark.parametrize("sharpen", POWERS)
def test_threads_and_parts(sharpen: int | None, threads: int, device: torch.device) -> None:
    """Few rows over many keys are cut into parts; the same bits every time."""
    for shape in (Shape(length_q=2, length_k=5000, heads=1), Shape(length_q=90, length_k=5000, heads=1)):
        inputs, grad_output = random_inputs(shape, torch.float32, device)
        first, second = (check(inputs, grad_output, sharpen=sharpen) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sharpen", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_of_keys(dtype: torch.dtype, sharpen: int | None, device: torch.device) -> None:
    """What lies outside of them has no effect, and no gradient."""
    shape = Shape(length_q=30, length_k=120, batch=3, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    used = {"seqused_k": torch.tensor([120, 0, 37]).int(), "leftpad_k": torch.tensor([5, 0, 31]).int()}
    expected = check(inputs, grad_output, sharpen=sharpen, is_causal=True, **used)
    for b, (end, first) in enumerate(zip(used["seqused_k"], used["leftpad_k"], strict=True)):
        for name in ("key", "value"):
            inputs[name][b, :, :first] = inputs[name][b, :, end:] = math.nan
    actual = forward_backward(attnx.softplus_attention, inputs, grad_output, sharpen=sharpen, is_causal=True, **used)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sharpen", POWERS)
def test_hidden_keys_that_are_no_numbers(sharpen: int | None, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=40, length_k=50), torch.float32, device)
    options: dict[str, Any] = {"sharpen": sharpen, "window": (4, 2)}
    expected = forward_backward(attnx.softplus_attention, inputs, grad_output, **options)
    inputs["key"][:, :, :4] = inputs["value"][:, :, :4] = math.nan  # the first query sees keys from 6 on
    actual = forward_backward(attnx.softplus_attention, inputs, grad_output, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    inputs["key"][0, 0, 20] = math.inf
    assert attnx.softplus_attention(**inputs, **options)[0, 0, 10].isnan().all()


@pytest.mark.parametrize("sharpen", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_padding", [False, True])
def test_packed(has_padding: bool, dtype: torch.dtype, sharpen: int | None, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([3, 0, 70, 1], [4, 2, 90, 0]), dtype, device)
    if has_padding:
        inputs = {name: torch.cat([x, torch.full_like(x[:5], 7.0)]) for name, x in inputs.items()}
        grad_output = torch.cat([grad_output, torch.ones_like(grad_output[:5])])
    options = sizes | {"has_padding": has_padding, "sharpen": sharpen}
    results = check(inputs, grad_output, "softplus_attention_varlen", is_causal=True, **options)
    if has_padding:
        assert all((x[-5:] == 0).all() for x in results.values())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logsumexp(dtype: torch.dtype, mask: str, device: torch.device) -> None:
    shape = Shape(length_q=20, length_k=33, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    _, actual = attnx.softplus_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    assert (actual.dtype, actual.shape) == (parameter_dtype(dtype), shape.query()[:3])
    _, expected = reference.softplus_attention(**inputs, return_logsumexp=True, **MASKS[mask])
    assert torch.equal(actual.isneginf(), ~visible_pairs(shape, **MASKS[mask]).any(-1).expand_as(actual))
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual[finite].double(), expected[finite], rtol=0, atol=20 * torch.finfo(dtype).eps, msg=mask
    )


@pytest.mark.parametrize("sharpen", [*POWERS, 1])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 1)}, {"scale": 2.5}], ids=str)
def test_gradient(options: dict[str, Any], sharpen: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 6, 5), (2, 2, 9, 5), (2, 2, 9, 3)
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attnx.softplus_attention(query, key, value, sharpen=sharpen, **options)

    assert torch.autograd.gradcheck(attention, leaves, atol=1e-6, eps=1e-7)


def test_gradient_of_scale_and_logsumexp() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 2, 6, 5), (1, 1, 9, 5), (1, 1, 9, 3), (2,)
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Any:
        return attnx.softplus_attention(query, key, value, scale=scale, is_causal=True, return_logsumexp=True)

    assert torch.autograd.gradcheck(attention, leaves)
    packed = [x[0].transpose(0, 1) for x in leaves[:3]]
    ends = [torch.tensor([0, n]).int() for n in (6, 9)]
    output, logsumexp = attnx.softplus_attention_varlen(
        *packed, *ends, 6, 9, scale=leaves[3], is_causal=True, return_logsumexp=True
    )
    expected = attention(*leaves)
    torch.testing.assert_close(output.transpose(0, 1), expected[0][0])
    torch.testing.assert_close(logsumexp, expected[1][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length_q", [1, 40])
def test_rows_of_equal_weights(length_q: int, dtype: torch.dtype, device: torch.device) -> None:
    """No weight is above the mean: 0, and no gradient but in rows of three keys, from which no mean is taken."""
    inputs, grad_output = random_inputs(Shape(length_q=length_q, length_k=300), dtype, device)
    inputs["key"] = inputs["key"][:, :, :1].expand_as(inputs["key"]).contiguous()
    results = forward_backward(attnx.softplus_attention, inputs, grad_output, sharpen=15)
    assert all((x == 0).all() for x in results.values())
    mean = attnx.softplus_attention(**inputs, sharpen=15, window=(2, 0))
    expected = inputs["value"].double().unfold(2, 3, 1).mean(-1)[:, :, -length_q:]
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_the_highest_power_stays_in_range(device: torch.device) -> None:
    """u^64 overflows float32 as soon as a weight is four times the mean."""
    inputs, grad_output = random_inputs(Shape(length_q=100, length_k=2000, head_dim=64), torch.float32, device)
    results = forward_backward(attnx.softplus_attention, inputs, grad_output, sharpen=64)
    expected = reference.softplus_attention(**{name: x.double() for name, x in inputs.items()}, sharpen=64)
    assert all(x.isfinite().all() for x in results.values())
    torch.testing.assert_close(results["output"].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sharpen", [3, 15])
def test_tiles_without_a_weight_are_left_out(sharpen: int, device: torch.device) -> None:
    """Keys that point away weigh nothing, and their values are not read, not even where they are no numbers."""
    inputs, _ = random_inputs(Shape(length_q=70, length_k=400, head_dim=32), torch.float32, device)
    inputs["query"][..., 0], inputs["key"][..., 0] = 40.0, 40.0
    inputs["key"][:, :, 96:288, 0] = -40.0
    expected = reference.softplus_attention(**inputs, sharpen=sharpen)
    inputs["value"][:, :, 96:288] = math.nan
    torch.testing.assert_close(
        attnx.softplus_attention(**inputs, sharpen=sharpen).double(), expected, rtol=0, atol=1e-4
    )


def test_logits_grow_with_the_keys_that_a_row_sees() -> None:
    """A row under a mask is that row of a call on its keys alone."""
    inputs, _ = random_inputs(Shape(length_q=50, length_k=50), torch.float64, torch.device("cpu"))
    query, key, value = inputs.values()
    for options in ({"is_causal": True}, {"window": (6, 0)}, {"is_causal": True, "position_offset": -3}):
        output = attnx.softplus_attention(query, key, value, sharpen=3, **options)
        for i in (10, 49):
            end = i + 1 + options.get("position_offset", 0)
            keys = slice(end - 7 if "window" in options else 0, end)
            alone = attnx.softplus_attention(query[:, :, i : i + 1], key[:, :, keys], value[:, :, keys], sharpen=3)
            torch.testing.assert_close(output[:, :, i : i + 1], alone)


def test_parts_of_the_keys_merge() -> None:
    inputs, _ = random_inputs(Shape(length_q=9, length_k=64, head_dim=16), torch.float64, torch.device("cpu"))
    query, key, value = inputs.values()
    parts = [
        attnx.softplus_attention(
            query, key[:, :, s], value[:, :, s], scale=math.log(16) * math.log(64) / math.log(n), return_logsumexp=True
        )
        for s, n in ((slice(40), 40), (slice(40, 64), 24))
    ]
    merged, logsumexp = attnx.merge_attention(*zip(*parts, strict=True))
    expected = attnx.softplus_attention(query, key, value, return_logsumexp=True)
    torch.testing.assert_close((merged, logsumexp), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "power": ({"sharpen": 0}, "sharpen: expected None or a whole number from 1 to 64, got 0"),
    "no whole power": ({"sharpen": 2.5}, "sharpen: expected None or a whole number from 1 to 64, got 2.5"),
    "logsumexp": ({"sharpen": 3, "return_logsumexp": True}, "return_logsumexp: expected False with sharpen, got True"),
    "scale": ({"scale": "1"}, "scale: expected None, a number"),
    "scales": (
        {"scale": torch.ones(3)},
        r"scale: expected None, a number, or a floating point tensor of shape \(\) or",
    ),
    "window": ({"window": 3}, "window: expected None or a pair"),
    "causal": ({"is_causal": 1}, "is_causal: expected True or False, got 1"),
    "key": ({"key": torch.zeros(1, 2, 33, 8)}, "key: expected"),
    "rank": ({"key": torch.zeros(33, 16)}, "key: expected 4 dimensions"),
    "dtype": ({"query": torch.zeros(1, 2, 33, 16, dtype=torch.int32)}, "query: expected one of float32"),
    "lengths": ({"seqused_k": torch.tensor([34]).int()}, "seqused_k: expected lengths from 0 to that of key, 33, got"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(change: dict[str, Any], message: str) -> None:
    inputs, _ = random_inputs(Shape(), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"^{message}"):
        attnx.softplus_attention(**inputs | change)


def test_the_operator_checks_its_power() -> None:
    inputs, _ = random_inputs(Shape(), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"^power: expected a whole number from 1 to 64, got 65"):
        torch.ops.attnx.sharpened_softplus_attention(*inputs.values(), None, None, 1.0, False, -1, -1, 0, 65)


def test_operators_with_a_choice_of_scores_do_not_offer_it() -> None:
    inputs, _ = random_inputs(Shape(), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="score: expected"):
        attnx.attention_key_weights(inputs["query"], inputs["key"], score="softplus")  # type: ignore[arg-type]


def test_explain() -> None:
    inputs, _ = random_inputs(Shape(), torch.float32, torch.device("cpu"))
    explanation = attnx.explain(attnx.softplus_attention, **inputs, is_causal=True)
    assert explanation.supported
    assert explanation.kernel is not None
    assert explanation.kernel.startswith("softplus_attention [")
    sharpened = attnx.explain(attnx.softplus_attention, **inputs, sharpen=3)
    assert sharpened.kernel is not None
    assert sharpened.kernel.startswith("sharpened_softplus_attention [")


def test_nested() -> None:
    rows = [torch.randn(n, 2, 8) for n in (5, 9)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    output = attnx.softplus_attention(x, x, x, is_causal=True, sharpen=2)
    for own, row in zip(output.unbind(), rows, strict=True):
        one = row.transpose(0, 1)[None]
        torch.testing.assert_close(own[None], attnx.softplus_attention(one, one, one, is_causal=True, sharpen=2))


@pytest.mark.parametrize("sharpen", [None, 15])
def test_module(sharpen: int | None) -> None:
    torch.manual_seed(0)
    module = SoftplusAttention(24, 4, num_kv_heads=2, sharpen=sharpen, is_causal=True, window=(5, 0)).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    query, key, value = module.project(x, None)
    expected = reference.softplus_attention(query, key, value, sharpen=sharpen, is_causal=True, window=(5, 0))
    torch.testing.assert_close(module(x), module.merge(expected))
    assert "window=(5, 0)" in repr(module)
    assert ("sharpen=15" in repr(module)) == (sharpen == 15)
    with pytest.raises(ValueError, match=r"^attn_mask: "):
        module(x, attn_mask=torch.zeros(9, 9))
    with pytest.raises(ValueError, match=r"^sharpen: expected None or a whole number from 1 to 64, got 0"):
        SoftplusAttention(24, 4, sharpen=0)
