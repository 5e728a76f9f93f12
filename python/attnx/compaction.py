"""Token pruning: the tokens that stay, packed end to end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnx import _arguments

__all__ = ["PackedTokens", "compact_tokens"]


class PackedTokens(NamedTuple):
    """What is left of a batch of sequences, as the ``_varlen`` functions take it."""

    tokens: Tensor  # (total, ...): the tokens that stay, of the first sequence first, in their order
    cu_seqlens: Tensor  # (batch + 1,) int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]
    indices: Tensor  # (total,) int32: where each of them stood in its sequence


def compact_tokens(
    x: Tensor,
    keep: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    k: int | None = None,
    threshold: float | None = None,
) -> PackedTokens:
    """Keeps some tokens of each sequence: those of a mask, the k with the highest scores, or those above a threshold.

    Args:
        x: (batch, length, ...).
        keep: (batch, length), bool; without scores.
        scores: (batch, length), floating point, of which no gradient comes. NaN counts as the lowest.
        k: how many tokens of each sequence stay, from 0 to length: those with the highest scores, of equal ones the
            earlier.
        threshold: the least score that stays. Exactly one of ``k`` and ``threshold`` comes with scores.

    Returns:
        The tokens in their order, their ``cu_seqlens`` and their indices. The tokens are differentiable with respect to
        x. With ``k`` all sizes are known beforehand; with a mask or a threshold the host waits for the device, to learn
        how many tokens stay. A sequence may keep none.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Sources: "VTC-CLS", arXiv 2412.05819; "Adaptive Sparse ViT", arXiv 2209.13802.
    """
    _arguments.tensors(x=x)
    _arguments.optional_tensors(keep=keep, scores=scores)
    if x.dim() < 2:
        _arguments.refuse("x", "(batch, length, ...)", x)
    batch, length = x.shape[:2]
    if (keep is None) == (scores is None):
        raise RuntimeError("keep: expected either a mask or scores, got " + ("neither" if keep is None else "both"))
    for name, given in (("keep", keep), ("scores", scores)):
        if given is not None and (given.shape, given.device) != ((batch, length), x.device):
            raise RuntimeError(
                f"{name}: expected shape {(batch, length)} on {x.device}, got {tuple(given.shape)} on {given.device}"
            )
    if scores is None:
        if k is not None or threshold is not None:
            raise RuntimeError("k: expected None with keep, as is threshold, got a number")
    elif (k is None) == (threshold is None):
        raise RuntimeError(
            "k: expected either k or threshold with scores, got " + ("both" if k is not None else "neither")
        )

    if k is not None and scores is not None:
        most = _arguments.integer("k", k, 0, length, f"an int from 0 to the length, {length}")
        rank = scores.detach().where(~scores.isnan(), -torch.inf)
        chosen = rank.sort(dim=1, descending=True, stable=True).indices[:, :most].sort(dim=1).values
        cu_seqlens = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * most
        rows = (chosen + torch.arange(batch, device=x.device)[:, None] * length).flatten()
    else:
        if keep is None:
            assert scores is not None
            assert threshold is not None
            keep = scores.detach() >= _arguments.number("threshold", threshold)
        elif keep.dtype != torch.bool:
            raise RuntimeError(f"keep: expected a bool tensor, got {keep.dtype}")
        cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        rows = keep.flatten().nonzero().flatten()
    return PackedTokens(x.flatten(0, 1).index_select(0, rows), cu_seqlens, (rows % max(length, 1)).int())
