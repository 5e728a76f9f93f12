"""attnx: the attention kernels that PyTorch does not have, for the CPU and the GPU."""

import torch as _torch  # noqa: F401  (before _C: it loads the libraries that libattnx links)

from attnx import _C, _operators

_operators.register_all()

from attnx import importance, nn, reference  # noqa: E402  (they use the registered operators)
from attnx.affine import affine_attention  # noqa: E402
from attnx.block_mask import BlockMask  # noqa: E402
from attnx.compaction import PackedTokens, compact_tokens  # noqa: E402
from attnx.delta_rule import gated_delta_rule  # noqa: E402
from attnx.disentangled import disentangled_attention, log_distance_buckets  # noqa: E402
from attnx.explain import explain  # noqa: E402
from attnx.functional import (  # noqa: E402
    block_sparse_attention,
    block_sparse_attention_varlen,
    sigmoid_attention,
    sigmoid_attention_varlen,
    softmax_attention,
    softmax_attention_varlen,
)
from attnx.hierarchical import hierarchical_attention, hierarchical_routes  # noqa: E402
from attnx.linear import linear_attention  # noqa: E402
from attnx.mainloop import cuda_mainloop  # noqa: E402
from attnx.merging import merge_attention, redistribute_attention  # noqa: E402
from attnx.pointer import pointer_argmax, pointer_log_prob, pointer_sample  # noqa: E402
from attnx.probabilistic import (  # noqa: E402
    keep_probabilities,
    probabilistic_attention,
    probabilistic_attention_varlen,
    probabilistic_block_mask,
)
from attnx.rectified import rectified_attention  # noqa: E402
from attnx.relative import relative_bias_attention, relative_position_buckets  # noqa: E402
from attnx.routing import (  # noqa: E402
    Routes,
    commitment_loss,
    nearest_centroids,
    route,
    route_varlen,
    routing_attention,
    routing_attention_varlen,
    update_centroids_,
)
from attnx.softplus import softplus_attention, softplus_attention_varlen  # noqa: E402
from attnx.sparse_linear import (  # noqa: E402
    SparseLinearMap,
    sparse_linear_attention,
    sparse_linear_attention_varlen,
    sparse_linear_block_map,
    sparse_linear_block_map_varlen,
)
from attnx.staircase import StaircaseCache, staircase_attention  # noqa: E402
from attnx.weights import attention_key_weights, attention_max_logits, attention_row_weights  # noqa: E402

__version__: str = _C.version

__all__ = [
    "BlockMask",
    "PackedTokens",
    "Routes",
    "SparseLinearMap",
    "StaircaseCache",
    "affine_attention",
    "attention_key_weights",
    "attention_max_logits",
    "attention_row_weights",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "commitment_loss",
    "compact_tokens",
    "cuda_mainloop",
    "disentangled_attention",
    "explain",
    "gated_delta_rule",
    "hierarchical_attention",
    "hierarchical_routes",
    "importance",
    "keep_probabilities",
    "linear_attention",
    "log_distance_buckets",
    "merge_attention",
    "nearest_centroids",
    "nn",
    "pointer_argmax",
    "pointer_log_prob",
    "pointer_sample",
    "probabilistic_attention",
    "probabilistic_attention_varlen",
    "probabilistic_block_mask",
    "rectified_attention",
    "redistribute_attention",
    "reference",
    "relative_bias_attention",
    "relative_position_buckets",
    "route",
    "route_varlen",
    "routing_attention",
    "routing_attention_varlen",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "softmax_attention",
    "softmax_attention_varlen",
    "softplus_attention",
    "softplus_attention_varlen",
    "sparse_linear_attention",
    "sparse_linear_attention_varlen",
    "sparse_linear_block_map",
    "sparse_linear_block_map_varlen",
    "staircase_attention",
    "update_centroids_",
]
