"""Attention over sequences, and heads, that several processes share, on ``torch.distributed``.

A sequence is cut into shards of one length, one for each process of a group (:func:`shard_sequence`), and what works on
tokens alone works on shards. Attention needs the keys of the others: they travel around a ring
(:func:`ring_softmax_attention`, :func:`ring_sigmoid_attention`, :func:`ring_sparse_linear_attention`), or heads are
exchanged for the sequence (:func:`ulysses_attention`), which serves every attention function. Models that know of no
shards work within :func:`context_parallel`. Caches may be shared, too (:func:`all_merge_attention`). Where DTensors
shard the batch or heads, :func:`register_sharding` is all that the operators need.

A parameter that all processes hold, as a sink or a bias, gets on each of them the gradient of its own rows or heads.
The whole gradient is their sum over the group, as for the weights of any other layer that works on shards.
"""

from torch import distributed as _distributed

if not _distributed.is_available():
    raise ImportError("attnx.distributed: expected a build of torch with torch.distributed, got one without")

from attnx.distributed.context import context_parallel
from attnx.distributed.merging import all_merge_attention
from attnx.distributed.ring import ring_sigmoid_attention, ring_softmax_attention
from attnx.distributed.sequence import (
    Layout,
    gather_sequence,
    sequence_positions,
    shard_sequence,
)
from attnx.distributed.sharding import register_sharding
from attnx.distributed.sparse_linear import ring_sparse_linear_attention
from attnx.distributed.ulysses import local_heads, ulysses_attention

__all__ = [
    "Layout",
    "all_merge_attention",
    "context_parallel",
    "gather_sequence",
    "local_heads",
    "register_sharding",
    "ring_sigmoid_attention",
    "ring_softmax_attention",
    "ring_sparse_linear_attention",
    "sequence_positions",
    "shard_sequence",
    "ulysses_attention",
]
