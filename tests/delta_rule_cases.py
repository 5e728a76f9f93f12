"""Inputs of the gated delta rule, and its plain PyTorch form in chunks, as models run it without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import parameter_dtype


class DeltaShape(NamedTuple):
    batch: int = 2
    heads: int = 2
    value_heads: int = 2
    length: int = 130
    key_dim: int = 32
    value_dim: int = 48

    def state(self) -> tuple[int, int, int, int]:
        return self.batch, self.value_heads, self.key_dim, self.value_dim


def delta_inputs(
    shape: DeltaShape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    decay: float = 0.1,
    with_state: bool = True,
    with_carry: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Queries and keys of norm 1, as models make them; log decays are ``-decay`` on average."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows, gates = (shape.batch, shape.heads, shape.length), (shape.batch, shape.value_heads, shape.length)
    query, key = (torch.nn.functional.normalize(draw(*rows, shape.key_dim), dim=-1).to(dtype) for _ in range(2))
    inputs = {"query": query, "key": key, "value": draw(*gates, shape.value_dim).to(dtype)}
    inputs["log_decay"] = (-decay * draw(*gates).abs()).to(parameter_dtype(dtype))
    inputs["beta"] = draw(*gates).sigmoid().to(parameter_dtype(dtype))
    if with_state:
        inputs["initial_state"] = draw(*shape.state()).to(parameter_dtype(dtype))
    if with_carry:  # whole chunks, none, and what lies between
        drawn = draw(shape.batch, shape.value_heads, -(-shape.length // 64))
        inputs["carry"] = (1.5 * drawn + 0.5).clamp(0, 1).to(parameter_dtype(dtype))
    return {name: x.to(device) for name, x in inputs.items()}


def with_state(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Output and state as one tensor, the rows of the state after those of the tokens."""

    def both(**inputs: Any) -> Tensor:
        output, state = function(**inputs, return_state=True)
        return torch.cat((output, state.to(output.dtype)), 2)

    return both


def plain_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    carry: Tensor | None = None,
    normalize_qk: bool = False,
    return_state: bool = False,
    chunk: int = 64,
) -> Any:
    """In float32, or in float64 for float64: triangular systems of all chunks first, then chunk by chunk."""
    dtype, group, length = value.dtype, value.shape[1] // query.shape[1], query.shape[2]
    query, key, value = (x.to(beta.dtype) for x in (query, key, value))
    if normalize_qk:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query = query * (query.shape[3] ** -0.5 if scale is None else scale)
    query, key = (x.repeat_interleave(group, 1) for x in (query, key))
    padding = -length % chunk
    pad = torch.nn.functional.pad
    query, key, value = (pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (query, key, value))
    log_decay, beta = (pad(x, (0, padding)).unflatten(2, (-1, chunk)) for x in (log_decay, beta))
    sums = log_decay.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).tril()
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    coupling = (beta[..., None] * (key @ key.mT) * decays).tril(-1)
    # Row by row, the inverse of the unit lower triangular matrix.
    rows = [torch.eye(chunk, dtype=beta.dtype, device=query.device)[0].expand(*coupling.shape[:3], chunk)]
    for i in range(1, chunk):
        own = torch.zeros_like(rows[0])
        own[..., i] = 1
        rows.append(own - (coupling[..., i, :i, None] * torch.stack(rows, -2)).sum(-2))
    inverse = torch.stack(rows, -2)
    corrections = inverse @ (beta[..., None] * value)
    of_state = inverse @ (beta[..., None] * sums.exp()[..., None] * key)
    if initial_state is None:
        state = query.new_zeros(*value.shape[:2], query.shape[-1], value.shape[-1])
    else:
        state = initial_state.to(beta.dtype)
    outputs = []
    for n in range(query.shape[2]):
        q, k, total = query[:, :, n], key[:, :, n], sums[:, :, n]
        correction = corrections[:, :, n] - of_state[:, :, n] @ state
        pairs = (q @ k.mT) * decays[:, :, n]
        outputs.append((q * total.exp()[..., None]) @ state + pairs @ correction)
        last = total[..., -1:]
        added = (k * (last - total).exp()[..., None]).mT @ correction
        state = state * last.exp()[..., None] + (added if carry is None else carry[:, :, n, None, None] * added)
    output = torch.cat(outputs, 2)[:, :, :length].to(dtype) if outputs else value.flatten(2, 3).to(dtype)
    return (output, state) if return_state else output
