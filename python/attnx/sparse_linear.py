"""Sparse-linear attention: softmax over the critical blocks of a map, linear attention over the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attnx import _arguments, _nested, _shards
from attnx._layouts import takes_layouts
from attnx._operators.sparse_linear import longest
from attnx._structures import Lengths, check_lengths, register, same
from attnx.block_mask import BlockMask

__all__ = [
    "SparseLinearMap",
    "sparse_linear_attention",
    "sparse_linear_attention_varlen",
    "sparse_linear_block_map",
    "sparse_linear_block_map_varlen",
]

FeatureMap: TypeAlias = Literal["softmax", "elu", "relu"]
LinearScope: TypeAlias = Literal["marginal", "noncritical", "all"]
Rounding: TypeAlias = Literal["ceil", "floor"]

_ops = torch.ops.attnx

_MANY = 2**62  # more keys than there are, in an int that operators take

CRITICAL, MARGINAL, NEGLIGIBLE = 1, 0, -1


@dataclass(frozen=True, eq=False)
class SparseLinearMap:
    """What each block of keys is to each block of queries.

    It is a pytree: ``torch.export`` takes it as an argument. Two are equal where labels, sizes and lengths are.

    Attributes:
        labels: int8 (batch or 1, heads or 1, query_blocks, key_blocks), contiguous: 1 critical, 0 marginal,
            -1 negligible. Of packed sequences each counts its blocks from its own start, in as many rows and columns as
            the longest needs.
        block_size: queries and keys of a block, 64 or 128 each. The last block may be ragged.
        lengths: of queries and of keys, which the map is for, and calls with others are refused; None: any lengths of
            so many blocks, and packed sequences.
    """

    labels: Tensor
    block_size: tuple[int, int] = (64, 64)
    lengths: Lengths | None = None

    def critical_mask(self) -> BlockMask:
        """The critical blocks, as :func:`attnx.block_sparse_attention` takes them."""
        if self.lengths is not None and torch.compiler.is_compiling():
            # A graph does not know how many blocks there are (_operators/symbols.py), until it is told here.
            for size, length, block in zip(self.labels.shape[2:], self.lengths, self.block_size, strict=True):
                torch._check(size == -(-length // block))
        return BlockMask.from_dense(self.labels == CRITICAL, self.block_size, self.lengths)

    def to(self, device: torch.device | str) -> SparseLinearMap:
        """This map where its labels are there, or else a copy there."""
        labels = self.labels.to(device)
        return self if labels is self.labels else SparseLinearMap(labels, self.block_size, self.lengths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseLinearMap):
            return NotImplemented
        sizes = (self.block_size, self.lengths) == (other.block_size, other.lengths)
        return sizes and same(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.block_size, self.lengths, self.labels.shape))


register(SparseLinearMap, leaves=("labels", "lengths"), constants=("block_size",))


def _shares(critical: float, negligible: float) -> tuple[float, float]:
    critical = _arguments.share("critical", critical)
    negligible = _arguments.share("negligible", negligible)
    if critical + negligible > 1:
        raise RuntimeError(
            f"critical, negligible: expected shares of at most 1 together, got {critical} + {negligible}"
        )
    return critical, negligible


def _protect(protect: int) -> int:
    keys = _arguments.integer("protect", protect, 0, expected="a number of keys, 0 or more")
    return keys if keys < _MANY else _MANY


def _scale(scale: float | None) -> float | None:
    return None if scale is None else _arguments.number("scale", scale, "None or a number")


def _check_heads(query: Tensor, key: Tensor, rank: int) -> None:
    _arguments.tensors(query=query, key=key)
    for name, x in (("query", query), ("key", key)):
        if x.dim() != rank:
            layout = "(batch, heads, length, head_dim)" if rank == 4 else "(tokens, heads, head_dim)"
            raise RuntimeError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] or query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            "key: expected the head_dim of query and a divisor of its heads, "
            f"got shape {tuple(key.shape)} with query {tuple(query.shape)}"
        )


@torch.no_grad()
def sparse_linear_block_map(
    query: Tensor,
    key: Tensor,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    smooth_k: bool = False,
    scale: float | None = None,
    protect: int = 0,
    rounding: Rounding = "ceil",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> SparseLinearMap:
    r"""Sorts the blocks of keys into critical, marginal and negligible ones, for each block of queries.

    Queries and keys are averaged over their blocks, and the blocks of keys ranked by the products of the averages,
    which is the order of their softmax. Of c blocks the first max(1, ceil(critical c)) are critical, the last
    floor(negligible c) negligible; of equals the lower index comes first. With ``is_causal`` c counts the blocks that
    some query of the row sees; those that others of its queries do not see, and the one that holds the last key it
    sees, are critical whatever their rank, within the share or beyond it; those that no query sees are negligible.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        critical: share of the blocks, 0 to 1.
        negligible: likewise; the two sum to at most 1.
        block_size: queries and keys of a block, 64 or 128 each.
        is_causal: hide later keys, aligned bottom-right.
        smooth_k: subtract the mean key first. Without a mask it moves all products of a row alike: the ranks stay, but
            for rounding, which large means would otherwise drown them in.
        scale: of the products; its sign alone matters to the ranks.
        protect: the blocks that hold the first so many keys are critical for every query that may see them, such as
            the text in front of a video.
        rounding: ``"ceil"``, as above, or ``"floor"``, as the code of SLA's authors has it: max(1, floor(critical c))
            are critical.
        seqused_k: as in :func:`attnx.sigmoid_attention`: the shares are of the blocks of these keys, and blocks beyond
            them are negligible.
        leftpad_k: likewise; the blocks of keys of a sequence, and ``protect``, count from there.

    Returns:
        The map, for every sequence and query head. It has no gradient.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arXiv 2509.24006.
    """
    _shards.expect_whole("sparse_linear_block_map")
    critical, negligible = _shares(critical, negligible)
    block_q, block_k = _arguments.block_size(block_size)
    _check_heads(query, key, 4)
    protect, scale = _protect(protect), _scale(scale)
    _arguments.flag("is_causal", is_causal)
    _arguments.flag("smooth_k", smooth_k)
    lengths = _arguments.key_lengths(seqused_k, leftpad_k, query, key)
    labels = _ops.sparse_linear_block_map(
        query,
        key,
        *lengths,
        block_q,
        block_k,
        critical,
        negligible,
        _arguments.text("rounding", rounding),
        smooth_k,
        protect,
        scale,
        is_causal,
    )
    return SparseLinearMap(labels, (block_q, block_k), (query.shape[2], key.shape[2]))


@torch.no_grad()
def sparse_linear_block_map_varlen(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    is_causal: bool = False,
    smooth_k: bool = False,
    scale: float | None = None,
    protect: int = 0,
    rounding: Rounding = "ceil",
) -> SparseLinearMap:
    """:func:`sparse_linear_block_map` of sequences packed end to end, each with blocks and shares of its own.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, where sequences start and end.
        max_seqlen_q, max_seqlen_k: the longest sequences, or more. Without them cu_seqlens are read on the host, which
            breaks a torch.compile graph and waits for the GPU.

    Returns:
        Labels (batch, heads, query_blocks, key_blocks) as large as max_seqlen needs, or all rows do, negligible beyond
        a shorter sequence.
    """
    _shards.expect_whole("sparse_linear_block_map_varlen")
    critical, negligible = _shares(critical, negligible)
    block_q, block_k = _arguments.block_size(block_size)
    _check_heads(query, key, 3)
    _arguments.tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    protect, scale = _protect(protect), _scale(scale)
    _arguments.flag("is_causal", is_causal)
    _arguments.flag("smooth_k", smooth_k)
    labels = _ops.sparse_linear_block_map_varlen(
        query,
        key,
        cu_seqlens_q,
        cu_seqlens_k,
        longest(cu_seqlens_q) if max_seqlen_q is None else _arguments.integer("max_seqlen_q", max_seqlen_q),
        longest(cu_seqlens_k) if max_seqlen_k is None else _arguments.integer("max_seqlen_k", max_seqlen_k),
        block_q,
        block_k,
        critical,
        negligible,
        _arguments.text("rounding", rounding),
        smooth_k,
        protect,
        scale,
        is_causal,
    )
    return SparseLinearMap(labels, (block_q, block_k))


_MAP_DEFAULTS: dict[str, Any] = {
    "critical": 0.05,
    "negligible": 0.10,
    "block_size": (64, 64),
    "smooth_k": False,
    "protect": 0,
    "rounding": "ceil",
}


def _check_map(block_map: SparseLinearMap) -> None:
    if not isinstance(block_map, SparseLinearMap):
        _arguments.refuse("block_map", "None or attnx.SparseLinearMap", block_map)


def _check_no_map_options(**options: Any) -> None:
    for name, x in options.items():
        if isinstance(x, Tensor) or x != _MAP_DEFAULTS[name]:
            _arguments.refuse(name, "its default with block_map, which has it settled", x)


@takes_layouts
def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_map: SparseLinearMap | None = None,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = False,
    protect: int = 0,
    rounding: Rounding = "ceil",
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Softmax attention over the critical blocks, and linear attention over others, apart.

    .. math:: O^s_i = \sum_{j \in C_i} \mathrm{softmax}_{C_i}(s\, q_i \cdot k_j)\, v_j, \qquad
        O^l_i = \frac{\phi(q_i) \sum_{j \in S_i} \phi(k_j)^T v_j}{\phi(q_i) \sum_{j \in S_i} \phi(k_j)^T}

    where C and S are the keys, of those that the query sees, in the critical blocks of its row and in the blocks of
    the linear scope. A row that sees none of them gives 0, and so does a linear row whose weights are all 0. The
    linear part costs as much as the length, whatever the scope; a module learns how to add the two
    (:class:`attnx.nn.SparseLinearAttention`).

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim).
        block_map: from :func:`sparse_linear_block_map`, or one's own; its own are the block sizes and shares then.
        critical, negligible, block_size, smooth_k, protect, rounding: without ``block_map``, as that function takes
            them.
        feature_map: phi, of each query and key by itself: softmax over its features, elu(x) + 1, or relu.
        linear_scope: "marginal": the marginal blocks, as in the paper. "noncritical": the negligible ones too. "all":
            every block.
        is_causal: hide later keys, aligned bottom-right; from the linear part, too.
        scale: of the softmax's logits; 1/sqrt(head_dim) by default.

    The inputs share one dtype (float32, bfloat16, float16, float64) and device. Sums are kept in float32 (float64 for
    float64). Nested tensors of layout ``torch.jagged`` go to :func:`sparse_linear_attention_varlen`. A call takes a
    matrix of head_dim by value_dim + 1 numbers for each block of keys, of one head at a time.

    ``enable_gqa`` and other layouts of query, key and value are taken as by :func:`attnx.sigmoid_attention`.

    Returns:
        O^s and O^l, each (batch, heads, length_q, value_dim) in the dtype of query. The map has no gradient.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Zhang et al., arXiv 2509.24006, whose released kernels have the other two scopes.
    """
    _shards.expect_whole("sparse_linear_attention")
    _arguments.flag("enable_gqa", enable_gqa)
    if isinstance(query, Tensor) and query.is_nested:
        options: dict[str, Any] = {"critical": critical, "negligible": negligible, "block_size": block_size}
        options |= {"feature_map": feature_map, "linear_scope": linear_scope, "is_causal": is_causal, "scale": scale}
        options |= {"block_map": block_map, "smooth_k": smooth_k, "protect": protect}
        options["rounding"] = rounding
        _nested.expect_no_lengths(seqused_k=seqused_k, leftpad_k=leftpad_k)
        return _nested.attend(sparse_linear_attention_varlen, query, key, value, **options)
    _arguments.tensors(query=query, key=key, value=value)
    if block_map is None:
        block_map = sparse_linear_block_map(
            query,
            key,
            critical=critical,
            negligible=negligible,
            block_size=block_size,
            is_causal=is_causal,
            smooth_k=smooth_k,
            scale=scale,
            protect=protect,
            rounding=rounding,
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
        )
    else:
        _check_map(block_map)
        _check_no_map_options(
            critical=critical,
            negligible=negligible,
            block_size=block_size,
            smooth_k=smooth_k,
            protect=protect,
            rounding=rounding,
        )
    check_lengths("block_map", block_map.lengths, query, key)
    sparse, linear, _ = _ops.sparse_linear_attention(
        query,
        key,
        value,
        *_arguments.key_lengths(seqused_k, leftpad_k, query, key),
        block_map.labels,
        *block_map.block_size,
        _arguments.text("feature_map", feature_map),
        _arguments.text("linear_scope", linear_scope),
        _scale(scale),
        _arguments.flag("is_causal", is_causal),
    )
    return sparse, linear


def sparse_linear_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_map: SparseLinearMap | None = None,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = False,
    protect: int = 0,
    rounding: Rounding = "ceil",
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_linear_attention` over packed sequences, laid out as in :func:`attnx.sigmoid_attention_varlen`.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_dim).
        block_map: from :func:`sparse_linear_block_map_varlen`, which is called without it.

    Returns:
        O^s and O^l, each (total_q, heads, value_dim).
    """
    _shards.expect_whole("sparse_linear_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    packing = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_map is None:
        block_map = sparse_linear_block_map_varlen(
            query,
            key,
            *packing,
            critical=critical,
            negligible=negligible,
            block_size=block_size,
            is_causal=is_causal,
            smooth_k=smooth_k,
            scale=scale,
            protect=protect,
            rounding=rounding,
        )
    else:
        _check_map(block_map)
        _check_no_map_options(
            critical=critical,
            negligible=negligible,
            block_size=block_size,
            smooth_k=smooth_k,
            protect=protect,
            rounding=rounding,
        )
    sparse, linear, _ = _ops.sparse_linear_attention_varlen(
        query,
        key,
        value,
        *packing,
        block_map.labels,
        *block_map.block_size,
        _arguments.text("feature_map", feature_map),
        _arguments.text("linear_scope", linear_scope),
        _scale(scale),
        _arguments.flag("is_causal", is_causal),
    )
    return sparse, linear
