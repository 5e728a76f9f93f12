"""What is special to the block-sparse operators."""

from __future__ import annotations

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
    blocks = -(-key.shape[2] // arguments["block_k"])
    return dict(zip(names, transpose(counts, indices, bias, blocks), strict=True))
