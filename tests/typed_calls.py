"""What type checkers must make of calls; test_types.py runs them over this file, and nothing runs the file."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import attnx
import attnx.distributed
from attnx.nn import RoutingAttention

Pair = tuple[Tensor, Tensor]

q = k = v = torch.randn(1, 2, 64, 32)
cu = torch.tensor([0, 64], dtype=torch.int32)
mask = attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
wanted = bool(torch.rand(()) < 0.5)

attnx.softmax_attention(q, k, v).sum()
assert_type(attnx.sigmoid_attention(q, k, v, bias=-1.0), Tensor)
assert_type(attnx.softmax_attention(q, k, v, is_causal=True, scale=torch.tensor(1.0)), Tensor)
assert_type(attnx.softmax_attention(q, k, v, return_logsumexp=True, sink=torch.zeros(2)), Pair)
assert_type(attnx.softmax_attention(q, k, v, return_logsumexp=wanted), Tensor | Pair)
assert_type(attnx.softmax_attention_varlen(q[0], k[0], v[0], cu, cu, 64, 64), Tensor)
assert_type(attnx.softmax_attention_varlen(q[0], k[0], v[0], cu, cu, 64, 64, return_logsumexp=True), Pair)
assert_type(attnx.block_sparse_attention(q, k, v, mask, score="sigmoid"), Tensor)
assert_type(attnx.block_sparse_attention(q, k, v, mask, return_logsumexp=True), Pair)
assert_type(attnx.linear_attention(q, k, v, feature_map="elu"), Tensor)
assert_type(attnx.linear_attention(q, k, v, return_state=True), Pair)
assert_type(attnx.linear_attention(q, k, v, return_state=wanted), Tensor | Pair)
assert_type(attnx.gated_delta_rule(q, k, v, q[..., 0], q[..., 0]), Tensor)
assert_type(attnx.gated_delta_rule(q, k, v, q[..., 0], q[..., 0], return_state=True), Pair)
assert_type(attnx.gated_delta_rule(q, k, v, q[..., 0], q[..., 0], return_state=wanted), Tensor | Pair)
assert_type(attnx.probabilistic_attention(q, k, v, seed=1, offset=0), Tensor)
assert_type(attnx.probabilistic_attention(q, k, v, return_logsumexp=True), Pair)

ring = attnx.distributed.ring_softmax_attention
assert_type(ring(q, k, v, layout="zigzag"), Tensor)
assert_type(ring(q, k, v, return_logsumexp=True), Pair)
assert_type(attnx.distributed.ring_sigmoid_attention(q, k, v, bias="row"), Tensor)
assert_type(attnx.distributed.ring_sparse_linear_attention(q, k, v, critical=0.1), Pair)
assert_type(attnx.distributed.ulysses_attention(attnx.sparse_linear_attention, q, k, v, critical=0.1), Pair)

cache = attnx.StaircaseCache(1, 2, 32, 100)
cache.attend(q).sum()
assert_type(cache.attend(q, scale=1.0), Tensor)
assert_type(cache.attend(q, return_logsumexp=True), Pair)
assert_type(attnx.staircase_attention(q, cache), Tensor)
assert_type(attnx.staircase_attention(q, cache, return_logsumexp=True), Pair)
assert_type(cache.to("cpu"), attnx.StaircaseCache)

module = RoutingAttention(64, 2, 4)
assert_type(module.forward(q[0]), Tensor)
assert_type(module.forward(q[0], return_loss=True), Pair)
assert_type(attnx.sparse_linear_attention(q, k, v), Pair)
