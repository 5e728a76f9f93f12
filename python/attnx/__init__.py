"""attnx: the attention kernels that PyTorch does not have, for the CPU and the GPU."""

import torch as _torch  # noqa: F401  (before _C: it loads the libraries that libattnx links)

from attnx import _C, _block_sparse, _operators

_operators.register()
_block_sparse.register()

from attnx import nn, reference  # noqa: E402  (they use the registered operators)
from attnx.block_mask import BlockMask  # noqa: E402
from attnx.explain import explain  # noqa: E402
from attnx.functional import (  # noqa: E402
    block_sparse_attention,
    sigmoid_attention,
    sigmoid_attention_varlen,
    softmax_attention,
    softmax_attention_varlen,
)

__version__: str = _C.version

__all__ = [
    "BlockMask",
    "block_sparse_attention",
    "explain",
    "nn",
    "reference",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "softmax_attention",
    "softmax_attention_varlen",
]
