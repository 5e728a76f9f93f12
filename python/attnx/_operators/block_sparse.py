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
    key = arguments["key"]
    names = ("q_num_blocks", "q_indices", "q_block_bias")
    if _capability.backend_of(key.device) != "cuda":
        return dict.fromkeys(names)
    if bias is not None and bias.requires_grad:
        raise NotImplementedError(_capability.refusal("block_sparse_attention", arguments))
    blocks = -(-key.shape[2] // arguments["block_k"])
    return dict(zip(names, transpose(counts, indices, bias, blocks), strict=True))


def grad_block_bias(arguments: Arguments) -> Tensor:
    """Each listed block of each head has one, also where one bias serves several; without a bias it is empty."""
    query, indices = arguments["query"], arguments["kv_indices"]
    wanted = arguments["block_bias"] is not None and _capability.backend_of(query.device) != "cuda"
    return query.new_empty((*query.shape[:2], *indices.shape[2:]) if wanted else 0, dtype=torch.float64)
