"""Terms of logits as tests draw them, and how calls with them are compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.block_mask import dense_bias
from attnx.testing import assert_close
from backends import Backend
from cases import Shape, parameter_dtype
from compare import forward_backward

GRADIENTS = ("attn_mask", "key_bias", "key_mask")  # these may be together


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_term(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, served: str = "each", seed: int = 5
) -> Any:
    """The argument of a name; ``served`` says whether each sequence and head has its own, or which share one."""
    batch = 1 if served in ("sequences", "all") else shape.batch
    heads = 1 if served in ("heads", "all") else shape.heads
    length_q = 1 if served == "rows" else shape.length_q
    pairs, keys = (batch, heads, length_q, shape.length_k), (batch, heads, shape.length_k)
    kind = parameter_dtype(dtype)
    if name == "softcap":
        return 0.8
    if name == "bool_mask":
        return (torch.rand(pairs, generator=generator()) < 0.7).to(device)
    if name == "input_mask":
        return torch.randn(pairs, generator=generator()).to(device, dtype)
    if name == "attn_mask":
        mask = torch.randn(pairs, generator=generator())
        return mask.where(torch.rand(pairs, generator=generator(6)) < 0.8, -math.inf).to(device, kind)
    if name == "distance_bias":
        distances = shape.length_q + shape.length_k - 1
        return torch.randn(batch, heads, distances, generator=generator()).to(device, kind)
    if name == "row_bounds":
        ends = torch.randint(-9, shape.length_k + 9, (batch, heads, length_q, 2), generator=generator(seed))
        return ends.sort(-1).values.to(device, torch.int32)
    if name == "key_bias":
        return torch.randn(keys, generator=generator()).to(device, kind)
    if name == "key_mask":
        share = torch.rand(keys, generator=generator())
        return share.where(share > 0.2, 0.0).where(share < 0.8, 1.0).to(device, kind)
    return 0.3


def terms_of(names: tuple[str, ...], *args: Any) -> dict[str, Any]:
    terms: dict[str, Any] = {}
    for name in names:
        argument = {"bool_mask": "attn_mask", "input_mask": "attn_mask", "dropout": "dropout_p"}.get(name, name)
        terms[argument] = draw_term(name, *args)
    if "dropout_p" in terms:
        terms |= {"seed": 11, "offset": 3}
    return terms


def within(row_bounds: Tensor, length_k: int) -> Tensor:
    """The mask of pairs that bounds stand for."""
    j = torch.arange(length_k, device=row_bounds.device)
    return (j >= row_bounds[..., :1]) & (j < row_bounds[..., 1:])


def needs(backend: Backend, names: tuple[str, ...], gradients: bool = True) -> None:
    """Skips what the capability table does not have on the backend."""
    for name in names:
        feature = {"bool_mask": "attn_mask", "input_mask": "attn_mask"}.get(name, name)
        has_gradient = gradients and feature in (*GRADIENTS, "distance_bias")
        wanted = [feature, f"{feature}_gradient"] if has_gradient else [feature]
        for need in wanted:
            if (reason := backend.missing(need)) and not (name == "bool_mask" and need.endswith("_gradient")):
                pytest.skip(reason)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    position_offset: int = 0,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    distance_bias: Tensor | None = None,
    row_bounds: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    constant_sums: bool = False,
    **draw: Any,
) -> Tensor:
    """Plain PyTorch, every step rounded to the dtype of ``query``; sums run from the last term to the first.

    With ``constant_sums`` the gradient leaves the sums of weights out: it shows how large the terms are that cancel.
    """
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    places = torch.arange(query.shape[2]) + key.shape[2] - query.shape[2] + position_offset
    distance = places[:, None] - torch.arange(key.shape[2])
    visible = reference._visible(distance, is_causal, window).to(query.device)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    logits = query.flip(-1) @ (key.flip(-1) * scale).repeat_interleave(groups, 1).mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    if score == "sigmoid":
        logits = logits - math.log(key.shape[2])
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(dtype)[:, None, None] * distance.abs().to(query.device, dtype)
    if row_bounds is not None:
        visible = visible & within(row_bounds, key.shape[2])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.to(dtype)
    if distance_bias is not None:
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
        logits = logits + distance_bias.to(dtype)[..., i - j + key.shape[2] - 1]
    if key_bias is not None:
        logits = logits + key_bias[:, :, None].to(dtype)
    share = 1.0 if key_mask is None else key_mask[:, :, None].to(dtype)
    logits = logits.masked_fill(~visible, -math.inf)
    if score == "sigmoid":
        weights = logits.sigmoid() * share
    else:
        counted = logits if key_mask is None else logits.masked_fill(key_mask[:, :, None] == 0, -math.inf)
        most = counted.amax(-1, keepdim=True).detach()
        if sink is None:  # a row in which no key counts has no weights
            logits = logits.masked_fill(most == -math.inf, -math.inf)
        most = most.clamp(min=-1e4)
        if sink is not None:
            most = most.maximum(sink.detach().to(dtype)[:, None, None])
        weights = (logits - most).exp() * share
        total = weights.flip(-1).sum(-1, keepdim=True)
        total = total.detach() if constant_sums else total
        if sink is not None:
            total = total + (sink.to(dtype)[:, None, None] - most).exp()
        weights = weights / total.where(total > 0, 1.0)
    if draw.get("dropout_p"):
        factors = reference.dropout_factors(weights.shape, draw.pop("dropout_p"), **draw)
        weights = weights * factors.to(query.device, dtype)
    return weights.flip(-1) @ value.repeat_interleave(groups, 1).flip(2)


def eager_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Plain PyTorch of each packed sequence. Rows that have no key, and those of padding, give 0."""
    nothing = query.sum(-1, keepdim=True).expand(-1, -1, value.shape[-1]) * 0
    by_key = {name: x for name, x in (("key_bias", key_bias), ("key_mask", key_mask)) if x is not None}
    outputs, (ends_q, ends_k) = [], (x.tolist() for x in (cu_seqlens_q, cu_seqlens_k))
    for n, (first_q, end_q, first_k, end_k) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        if first_k == end_k or first_q == end_q:
            outputs.append(nothing[first_q:end_q])
            continue
        own = [x.transpose(0, 1)[None] for x in (query[first_q:end_q], key[first_k:end_k], value[first_k:end_k])]
        numbers = {name: x[None, :, first_k:end_k] for name, x in by_key.items()}
        if options.get("dropout_p"):
            numbers["sequence"] = n
        outputs.append(eager(*own, **options, **numbers)[0].transpose(0, 1))
    return torch.cat([*outputs, nothing[ends_q[-1] :]])


def eager_lists(
    block_mask: attnx.BlockMask,
    *,
    block_bias: Tensor | None = None,
    attn_mask: Tensor | float = 0.0,
    **leaves: Any,
) -> Tensor:
    """Plain PyTorch over the elements of listed blocks, as a mask of pairs that is added."""
    length_q, length_k = leaves["query"].shape[2], leaves["key"].shape[2]
    block_q, block_k = block_mask.block_size
    blocks = -(-length_k // block_k)
    listed = block_mask.to_dense(blocks)
    numbers = torch.zeros(listed.shape, dtype=torch.float64, device=listed.device)
    if block_bias is not None:
        numbers = dense_bias(block_mask.kv_num_blocks, block_mask.kv_indices, block_bias, blocks)
    numbers = numbers.masked_fill(~listed, -math.inf)
    elements = numbers.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :length_q, :length_k]
    if block_mask.row_bounds is not None:
        elements = elements.masked_fill(~within(block_mask.row_bounds, length_k), -math.inf)
    return eager(**leaves, attn_mask=attn_mask + elements)


def check_packed(
    operator: str, inputs: dict[str, Tensor], grad_output: Tensor, sizes: dict[str, Any], **options: Any
) -> dict[str, Tensor]:
    """The same of packed sequences, by an operator's varlen form."""
    plain = {name: x for name, x in sizes.items() if name.startswith("cu_seqlens")} | {"score": operator.split("_")[0]}
    varlen = f"{operator}_varlen"
    forms = getattr(attnx, varlen), getattr(reference, varlen), eager_packed
    return _check(forms, inputs, grad_output, sizes | options, plain | options)


def check_lists(
    inputs: dict[str, Tensor], grad_output: Tensor, block_mask: attnx.BlockMask, score: str, **options: Any
) -> dict[str, Tensor]:
    """The same of listed blocks."""
    forms = attnx.block_sparse_attention, reference.block_sparse_attention, eager_lists
    options |= {"block_mask": block_mask, "score": score}
    return _check(forms, inputs, grad_output, options, options)


def _check(
    forms: tuple[Any, Any, Any],
    leaves: dict[str, Tensor],
    grad_output: Tensor,
    options: dict[str, Any],
    options_of_plain: dict[str, Any],
    floor: float | None = None,
) -> dict[str, Tensor]:
    """Holds the first form against the second in float64, by the error of the third, plain PyTorch."""
    attention, definition, plain = forms
    exact = {name: x.double() for name, x in leaves.items()}, grad_output.double()
    results = forward_backward(attention, leaves, grad_output, **options)
    expected = forward_backward(definition, *exact, **options)
    baseline = forward_backward(plain, leaves, grad_output, **options_of_plain)
    terms = forward_backward(plain, *exact, **options_of_plain, constant_sums=True)
    for name, x in results.items():
        like = leaves.get(name.removeprefix("grad_"), grad_output)
        assert (x.dtype, x.shape) == (like.dtype, like.shape), name
        sizes = terms[name] if name.startswith("grad_") else None
        assert_close(x, expected[name], baseline[name], terms=sizes, name=name, dtype=grad_output.dtype, floor=floor)
    return results


def check(
    operator: str, inputs: dict[str, Tensor], grad_output: Tensor, floor: float | None = None, **options: Any
) -> dict[str, Tensor]:
    """Holds the output and the gradients of inputs and terms against float64."""
    in_sums = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    others = {name: x for name, x in options.items() if name not in in_sums}
    forms = getattr(attnx, operator), getattr(reference, operator), eager
    return _check(forms, inputs | in_sums, grad_output, others, others | {"score": operator.split("_")[0]}, floor)
