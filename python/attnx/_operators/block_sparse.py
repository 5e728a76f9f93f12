"""What is special to the block-sparse operators."""

from __future__ import annotations

import torch
from torch import Tensor

from attnx import _capability
from attnx._operators.schema import Arguments
from attnx.block_mask import transpose


def transposed_lists(arguments: Arguments) -> Arguments:
    """The lists of the other side, which the backward on CUDA walks."""
    counts, indices, bias = (arguments[name] for name in ("kv_num_blocks", "kv_indices", "block_bias"))
    key, packed = arguments["key"], "cu_seqlens_k" in arguments
    names = ("q_num_blocks", "q_indices", "q_block_bias")
    if _capability.backend_of(key.device) != "cuda":
        return dict.fromkeys(names)
    blocks = -(-(arguments["max_seqlen_k"] if packed else key.shape[2]) // arguments["block_k"])
    return dict(zip(names, transpose(counts, indices, bias, blocks), strict=True))


def grad_block_bias(arguments: Arguments) -> Tensor:
    """Each listed block of each head has one, also where one bias serves several; it is empty where none is wanted."""
    query, indices = arguments["query"], arguments["kv_indices"]
    offsets = arguments.get("cu_seqlens_q")
    batch = query.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (batch, query.shape[1], *indices.shape[2:]) if arguments["block_bias_gradient"] else 0
    return query.new_empty(shape, dtype=torch.float64)
