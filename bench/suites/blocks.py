"""What block-sparse suites share: softmax over the blocks of a mask, as its definition, eager and flex_attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor

import attnx
import attnx.reference
from suite import Attention, Case, Formula, Inputs, Prepare
from suites import dense

MaskOf = Callable[[Case, Inputs], attnx.BlockMask]


def elements(blocks: Tensor, block_size: tuple[int, int], case: Case) -> Tensor:
    """A number for each block as one for each pair of query and key."""
    block_q, block_k = block_size
    every = blocks.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return every[..., : case.length_q, : case.length_k]


def softmax(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    logits = query / math.sqrt(query.shape[-1]) @ key.mT
    return logits.masked_fill(~visible, -math.inf).softmax(-1) @ value


def formula(mask_of: MaskOf) -> Formula:
    def reference(case: Case, exact: Inputs) -> Attention:
        function = attnx.reference.block_sparse_attention
        return functools.partial(function, block_mask=mask_of(case, exact), is_causal=case.is_causal)

    def eager(case: Case, inputs: Inputs) -> Attention:
        mask = mask_of(case, inputs)
        visible = elements(mask.to_dense(-(-case.length_k // mask.block_size[1])), mask.block_size, case)
        return functools.partial(softmax, visible=visible.tril() if case.is_causal else visible)

    return Formula(reference, eager)


def block_sparse(mask_of: MaskOf) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        mask = mask_of(case, inputs)
        return functools.partial(attnx.block_sparse_attention, block_mask=mask, is_causal=case.is_causal)

    return prepare


def flex(mask_of: MaskOf) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        mask = mask_of(case, inputs).to_flex(case.length_q, case.length_k, is_causal=case.is_causal)
        # For dynamic shapes torch 2.13 writes C++ that does not compile, of a mask that looks its blocks up.
        return functools.partial(dense.compiled_flex_attention(dynamic=False), block_mask=mask)

    return prepare
