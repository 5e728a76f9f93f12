"""Packed sequences of different lengths, beside PyTorch's varlen_attn, which is FlashAttention-2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Direction, Formula, Inputs, Prepare, Suite
from suites import dense

_LENGTHS = tuple(64 + 128 * i for i in range(16))  # 64 to 1984 tokens, 16384 in all


@dataclass(frozen=True)
class PackedCase(Case):
    """One batch of sequences, end to end; length_q and length_k count the tokens of all."""

    lengths: tuple[int, ...] = ()

    def flops(self, direction: Direction) -> float:
        return super().flops(direction) * sum(n * n for n in self.lengths) / self.length_q**2

    def shortened(self, length: int) -> PackedCase:
        lengths = tuple(min(n, length) for n in self.lengths)
        return replace(self, length_q=sum(lengths), length_k=sum(lengths), lengths=lengths)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Packed: (tokens, heads, head_dim)."""
        return Inputs(*(x[0].transpose(0, 1) for x in super().inputs(dtype, device, seed)))

    def __str__(self) -> str:
        lengths = f"{len(self.lengths)} sequences of {min(self.lengths)}-{max(self.lengths)}"
        return f"({lengths}, {self.heads}, {self.head_dim})" + (" causal" if self.is_causal else "")


def _case(head_dim: int, is_causal: bool) -> PackedCase:
    return PackedCase(
        f"varlen-d{head_dim}" + ("-causal" if is_causal else ""),
        2048 // head_dim,
        sum(_LENGTHS),
        sum(_LENGTHS),
        head_dim,
        is_causal=is_causal,
        quick=True,
        heads_inside=True,
        lengths=_LENGTHS,
    )


def _packed(function: Callable[..., Any], options: Callable[[Case], dict[str, Any]]) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        assert isinstance(case, PackedCase)
        ends = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=inputs.query.device)
        longest = max(case.lengths)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(query, key, value, ends, ends, longest, longest, **options(case))

        return attention

    return prepare


def _each_sequence(eager: Prepare) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        assert isinstance(case, PackedCase)

        def attention(*packed: Tensor) -> Tensor:
            outputs = []
            for sequence in zip(*(x.split(case.lengths) for x in packed), strict=True):
                length = sequence[0].shape[0]
                inputs = Inputs(*(x.transpose(0, 1)[None] for x in sequence))
                one = eager(replace(case, length_q=length, length_k=length), inputs)
                outputs.append(one(*inputs)[0].transpose(0, 1))
            return torch.cat(outputs)

        return attention

    return prepare


def _causal(case: Case) -> dict[str, Any]:
    return {"is_causal": case.is_causal}


def _torch_causal(case: Case) -> dict[str, Any]:
    if "is_causal" in inspect.signature(varlen_attn).parameters:  # torch 2.10
        return _causal(case)
    return {"window_size": (-1, 0 if case.is_causal else -1)}


SIGMOID = Formula(
    reference=_packed(attnx.reference.sigmoid_attention_varlen, _causal), eager=_each_sequence(dense.SIGMOID.eager)
)
SOFTMAX = Formula(
    reference=_packed(attnx.reference.softmax_attention_varlen, _causal), eager=_each_sequence(dense.SOFTMAX.eager)
)

SUITE = Suite(
    name="varlen",
    cases=tuple(_case(head_dim, is_causal) for head_dim in (128, 64) for is_causal in (False, True)),
    contenders=(
        Contender("attnx-sigmoid", SIGMOID, _packed(attnx.sigmoid_attention_varlen, _causal)),
        Contender("attnx-softmax", SOFTMAX, _packed(attnx.softmax_attention_varlen, _causal)),
        Contender("torch-varlen", SOFTMAX, _packed(varlen_attn, _torch_causal)),
    ),
    baseline="torch-varlen",
    memory_case=_case(128, is_causal=False),
)
