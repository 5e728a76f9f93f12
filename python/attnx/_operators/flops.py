"""What torch.utils.flop_counter counts of an operator: two operations for each number of each matrix product.

Like PyTorch's own formulas of attention, these leave masks out, of which a causal one hides half of the pairs. What a
call does not visit is not counted: blocks that no list names, keys beyond a window's both sides, other clusters. Where
lengths and lists are in tensors they are read; those of a traced call, which cannot be, count as the longest.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from attnx._operators.description import Operator
from attnx._operators.schema import Arguments, signature


def register(row: Operator, name: str) -> None:
    from torch.utils.flop_counter import flop_registry

    of = signature(name)

    def formula(*args: Any, out_val: Any = None, **others: Any) -> int:
        return int(row.flops(of.bind(args), name.endswith("_backward"))) if row.flops is not None else 0

    flop_registry[getattr(torch.ops.attnx, name)] = formula


def _numbers(x: Tensor) -> Any:
    """The values as nested lists, or None where there are none."""
    if x.device.type == "meta" or torch._guards.detect_fake_mode(x) is not None:
        return None
    return x.tolist()


def of_pairs(a: Arguments, pairs: int, backward: bool) -> int:
    """What so many pairs of a query and a key cost: S and O, or the products of the backward, which makes S again."""
    d, value_dim = a["query"].shape[-1], a["value"].shape[-1]
    return 2 * pairs * (3 * d + 2 * value_dim if backward else d + value_dim)


def lengths(a: Arguments) -> list[tuple[int, int]]:
    """Queries and keys of each sequence."""
    query, key = a["query"], a["key"]
    if "cu_seqlens_q" not in a:
        ends = None if a.get("seqused_k") is None else _numbers(a["seqused_k"] - a["leftpad_k"])
        return [(query.shape[2], length) for length in ends or [key.shape[2]] * query.shape[0]]
    sequences = a["cu_seqlens_q"].shape[0] - 1
    offsets = _numbers(a["cu_seqlens_q"]), _numbers(a["cu_seqlens_k"])
    if None in offsets:
        return [(a["max_seqlen_q"], a["max_seqlen_k"])] * sequences
    q, k = ([end - start for start, end in itertools.pairwise(x)] for x in offsets)
    return list(zip(q, k, strict=True))


def pairs_in_band(a: Arguments) -> int:
    """Every query with every key, or with as many as its window is wide."""
    left, right = a["window_left"], 0 if a["is_causal"] else a["window_right"]
    width = left + 1 + right if left >= 0 and right >= 0 else None
    return a["query"].shape[1] * sum(q * (k if width is None else min(k, width)) for q, k in lengths(a))


def band(a: Arguments, backward: bool) -> int:
    return of_pairs(a, pairs_in_band(a), backward)


def sharpened(a: Arguments, backward: bool) -> int:
    """A pass before makes S, and before the backward S and the products with the gradient of O."""
    pairs, d, value_dim = pairs_in_band(a), a["query"].shape[-1], a["value"].shape[-1]
    return of_pairs(a, pairs, backward) + 2 * pairs * (d + value_dim if backward else d)


def _of_blocks(a: Arguments, blocks: int, backward: bool) -> int:
    return of_pairs(a, blocks * a["block_q"] * a["block_k"], backward)


def listed(a: Arguments, backward: bool) -> int:
    counts, indices = a["kv_num_blocks"], a["kv_indices"]
    query = a["query"]
    heads = (query.shape[0] if "cu_seqlens_q" not in a else a["cu_seqlens_q"].shape[0] - 1, query.shape[1])
    known = _numbers(counts.expand(*heads, -1).sum())
    blocks = math.prod(heads) * indices.shape[2] * indices.shape[3]
    return _of_blocks(a, blocks if known is None else known, backward)


def drawn(a: Arguments, backward: bool) -> int:
    """Sequences of several lengths are counted one by one, in draws that are as likely as theirs."""
    of, heads = signature("probabilistic_block_lists"), a["query"].shape[1]
    sequences = lengths(a)
    each = [(len(sequences), sequences[0])] if len(set(sequences)) == 1 else [(1, own) for own in sequences]
    total = 0
    for batch, (length_q, length_k) in each:
        sizes = {"batch": batch, "heads": heads, "length_q": length_q, "length_k": length_k}
        counts, indices = of.call(a | sizes)
        known = _numbers(counts.sum())
        total += _of_blocks(a, math.prod(indices.shape) if known is None else known, backward)
    return total


def sparse_linear(a: Arguments, backward: bool) -> int:
    """The critical blocks, and of the linear part the products of keys with values and of queries with their sums."""
    block_map, heads = a["block_map"], a["query"].shape[1]
    sequences = lengths(a)
    known = _numbers((block_map == 1).expand(len(sequences), heads, -1, -1).sum())
    blocks = len(sequences) * heads * block_map.shape[2] * block_map.shape[3]
    tokens = sum(q + k for q, k in sequences)
    linear = 2 * heads * tokens * a["query"].shape[-1] * a["value"].shape[-1]
    return _of_blocks(a, blocks if known is None else known, backward) + (3 if backward else 1) * linear


def block_means(a: Arguments, backward: bool) -> int:
    query, blocks = a["query"], sum(-(-q // a["block_q"]) * -(-k // a["block_k"]) for q, k in lengths(a))
    return 2 * query.shape[1] * blocks * query.shape[-1]


def clusters(a: Arguments, backward: bool) -> int:
    memory = 0 if a["memory_key"] is None else a["memory_key"].shape[1]
    offsets = [_numbers(a[name].flatten(0, 1).diff()) for name in ("query_offsets", "key_offsets")]
    if None in offsets:
        batch, heads, count = a["query_offsets"].shape
        slots_q, slots_k = a["query_indices"].shape[2], a["key_indices"].shape[2] // max(count - 1, 1) + memory
        return of_pairs(a, batch * heads * slots_q * slots_k, backward)
    of_queries, of_keys = offsets
    heads = zip(of_queries, of_keys, strict=True)
    pairs = sum(q * (k + memory) for head in heads for q, k in zip(*head, strict=True))
    return of_pairs(a, pairs, backward)


def centroids(a: Arguments, backward: bool) -> int:
    """Rows, or queries and keys, with the centroids of each head."""
    heads, count, dim = a["centroids"].shape
    rows = [a[name] for name in ("rows", "query", "key") if name in a]
    if a.get("shared_qk"):
        rows = rows[:1]
    of_all = (x.numel() // (x.shape[1] * dim) for x in rows)  # packed or not
    return sum(2 * n * heads * count * dim for n in of_all)


def cached(a: Arguments, backward: bool) -> int:
    query, state = a["query"], _numbers(a["state"][:, 0])
    tokens = a["max_length"] * query.shape[0] if state is None else sum(state)
    return of_pairs(a | {"value": query}, query.shape[1] * query.shape[2] * tokens, backward)
