"""The attention operators as functions; each is one ``torch.ops.attnx`` operator with its defaults filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnx import _arguments, _head_mask, _nested, _shards
from attnx._layouts import takes_layouts
from attnx._scores import ScoreName, SigmoidBias, resolve_score
from attnx._structures import check_lengths
from attnx._terms import TermOptions, resolve_terms
from attnx.block_mask import BlockMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

_ops = torch.ops.attnx

Window: TypeAlias = tuple[int | None, int | None] | None


class SoftmaxOptions(TermOptions, total=False):
    """These are for type checkers, which tell by ``return_logsumexp`` what comes back."""

    scale: float | Tensor | None
    is_causal: bool
    window: Window
    position_offset: int
    alibi_slopes: Tensor | None
    sink: Tensor | None


class DenseOptions(SoftmaxOptions, total=False):
    enable_gqa: bool
    attn_mask: Tensor | None
    distance_bias: Tensor | None
    row_bounds: Tensor | None
    head_mask: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None


class PackedOptions(SoftmaxOptions, total=False):
    has_padding: bool
    head_mask: Tensor | None


class BlockSparseOptions(TermOptions, total=False):
    enable_gqa: bool
    attn_mask: Tensor | None
    distance_bias: Tensor | None
    score: ScoreName
    bias: SigmoidBias
    block_bias: Tensor | None
    sink: Tensor | None
    scale: float | Tensor | None
    is_causal: bool
    seqused_k: Tensor | None
    leftpad_k: Tensor | None


class PackedBlockSparseOptions(TermOptions, total=False):
    score: ScoreName
    bias: SigmoidBias
    block_bias: Tensor | None
    sink: Tensor | None
    scale: float | Tensor | None
    is_causal: bool
    has_padding: bool


def _mask(is_causal: bool, window: Window, position_offset: int) -> tuple[bool, int, int, int]:
    bounds = _arguments.window(window)
    return _arguments.flag("is_causal", is_causal), *bounds, _arguments.integer("position_offset", position_offset)


def _refuse_beside_nested(**given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None:
            _arguments.refuse(name, "None with nested tensors", x)


@takes_layouts
def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    distance_bias: Tensor | None = None,
    row_bounds: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Sigmoid attention: every key is weighted on its own, without normalisation over the row.

    .. math:: P_{ij} = \sigma(s\, q_i \cdot k_j + b_h - m_h |i + N_k - N_q - j|), \qquad O = P V

    and :math:`P_{ij} = 0` where a mask hides key j. A row that sees no key gives 0.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads, and consecutive query
            heads share a key head.
        value: (batch, kv_heads, length_k, value_dim).
        bias: what is added to every logit. None: -log(used keys), the paper's rule, under which the weights of
            a row start near a sum of 1. ``"row"``: -log(number of keys the row sees). A float. Or a tensor of
            shape () or (heads,), float32 (float64 for float64 inputs), which may require a gradient. -inf makes
            all weights 0.
        scale: factor on query . key, 1/sqrt(head_dim) by default. Or a tensor of shape () or (heads,), such as a
            learned temperature, which may require a gradient; the query is multiplied by it then, in its dtype.
        is_causal: hide later keys; aligned bottom-right, so that the last query sees the last key, which is the last
            used one where ``seqused_k`` says so.
        window: (left, right): how many keys before and after its own position a query sees; None or -1 for no bound,
            on a side or in the place of the pair. With ``is_causal`` the right bound is 0.
        position_offset: how many keys further on queries stand: query i stands at key
            i + keys - length_q + position_offset, where keys counts the used ones. ``is_causal``, ``window`` and
            ``alibi_slopes`` count from there. It is at most 2^28 either way. A query that stands before the first key
            sees none under ``is_causal``.
        seqused_k: (batch,) int32: sequence b has the keys ``leftpad_k[b]`` up to ``seqused_k[b]`` alone, as a cache
            has that is filled in part. The others have no effect, and their gradients are 0. None: all up to the last.
            There is no attn_mask, distance_bias, key_bias, key_mask or dropout beside it.
        leftpad_k: (batch,) int32, from 0 to ``seqused_k``. None: from the first. On the GPU, where it would wait for
            the device, nothing checks what the two hold: with wrong ones the kernels read and write out of bounds.
            ``ATTNX_DEBUG=1`` in the environment has them checked there as on the CPU.
        alibi_slopes: (heads,) or (), dtype as for bias; slope times distance is subtracted from the logit.
        softcap: c > 0, finite or inf for none: :math:`s\, q_i \cdot k_j` becomes
            :math:`c \tanh(s\, q_i \cdot k_j / c)`, before anything is added to it.
        attn_mask: (batch, heads, length_q, length_k), where each size may be 1, or the last 2 or 3 of these, of any
            strides. bool, where True takes part; or in the dtype of query, or
            as for bias, what is added to the logit, where -inf hides the key. It may require a gradient, which it gets
            in its own shape.
        distance_bias: (batch or 1, heads or 1, length_q + length_k - 1), dtype as for bias: number
            i - j + length_k - 1 is added to the logit of query i and key j, both counted from 0 in their tensors. It is
            a mask of pairs without its size, and stands in the place of ``attn_mask``. It may require a
            gradient. :func:`attnx.relative_bias_attention` makes it from a table of buckets.
        row_bounds: (batch or 1, heads or 1, length_q or 1, 2) int32: row i sees of its keys only those from
            ``row_bounds[..., i, 0]`` up to but not with ``row_bounds[..., i, 1]``, counted from the first one that
            ``leftpad_k`` leaves. A pair may reach beyond the keys on either side; an empty one hides them all. It
            says what a mask of pairs says that gives each row one interval, without that mask's size. The bias
            ``"row"`` does not count with it.
        key_bias: (batch or 1, heads or 1, length_k), dtype as for bias: what is added to the logits of a key. heads
            counts query heads. It may require a gradient.
        key_mask: of the same shape and dtype, in [0, 1], or bool: what the weights of a key are multiplied by. It may
            require a gradient, which is there also where it is 0. Values outside are refused on the CPU, and on the
            GPU under ``ATTNX_DEBUG=1``.
        head_mask: (heads,) or (batch, heads), dtype as for bias: what the output of a head is multiplied by. It may
            require a gradient. Where nobody wants that, the loop leaves a head of factor 0 out on the CPU, if all query
            heads of its key head are 0; on the GPU it is multiplied.
        dropout_p: the probability of a weight to be dropped, in [0, 1). It is rounded to a multiple of 1/256, p, and
            the others are divided by 1 - p. It applies whenever it is above 0; pass 0 in evaluation.
        generator: draws seed and offset where they are not given; by default torch's own of query's device.
        seed: an int or an int64 tensor of shape (), on query's device: with offset it decides which weights are
            dropped, on every backend alike, and in :mod:`attnx.reference`.
        offset: the round, from 0 to 2^32 - 1, likewise; a new one at each step drops others.
        enable_gqa: ``scaled_dot_product_attention`` has it. Key heads are shared whether it is True or False.

    Query, key and value may also be (heads, length, dim), or have more leading dimensions, over which the output is
    shaped like them; and a leading size or a number of heads may be 1, which then broadcasts to that of the others.
    ``attn_mask`` has the same leading dimensions, or sizes of 1, or the last of them; whatever else has a batch has
    one of all leading dimensions, flattened. The keywords are those of ``scaled_dot_product_attention``.

    The inputs share one dtype (bfloat16, float16; float32 and float64 on the CPU) and device. Strides are free but
    for a contiguous last dimension. Sums are kept in float32 (float64 for float64). Nested tensors of layout
    ``torch.jagged``, whose lengths differ, go to :func:`sigmoid_attention_varlen`, and the output is nested like query.

    On the GPU gradients are the same bits every time under ``torch.use_deterministic_algorithms(True)`` only, and what
    a hidden key or value holds has no effect as long as it is finite; on the CPU both hold always.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    arXiv 2409.04431. The softcap is that of Gemma 2, arXiv 2408.00118.
    """
    _arguments.flag("enable_gqa", enable_gqa)
    if isinstance(query, Tensor) and query.is_nested:
        options: dict[str, Any] = {"bias": bias, "scale": scale, "is_causal": is_causal, "window": window}
        options |= {"position_offset": position_offset, "alibi_slopes": alibi_slopes}
        options |= {"softcap": softcap, "dropout_p": dropout_p, "generator": generator, "seed": seed, "offset": offset}
        _nested.expect_no_lengths(seqused_k=seqused_k, leftpad_k=leftpad_k)
        _refuse_beside_nested(
            attn_mask=attn_mask,
            distance_bias=distance_bias,
            row_bounds=row_bounds,
            key_bias=key_bias,
            key_mask=key_mask,
        )
        options["head_mask"] = head_mask
        return _nested.attend(sigmoid_attention_varlen, query, key, value, **options)
    if (ring := _shards.ring("sigmoid_attention")) is not None:
        _shards.expect_nothing(seqused_k=seqused_k, leftpad_k=leftpad_k, attn_mask=attn_mask, row_bounds=row_bounds)
        _shards.expect_nothing(distance_bias=distance_bias, dropout_p=dropout_p, head_mask=head_mask)
        results: Tensor = ring(
            query,
            key,
            value,
            scale=scale,
            is_causal=is_causal,
            window=window,
            position_offset=position_offset,
            alibi_slopes=alibi_slopes,
            bias=bias,
            softcap=softcap,
            key_bias=key_bias,
            key_mask=key_mask,
        )
        return results
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(alibi_slopes=alibi_slopes)
    query, scale = _arguments.with_scale(query, scale)
    mask = _mask(is_causal, window, position_offset)
    s = resolve_score("sigmoid", bias, tensor_bias=True)
    of_heads = _head_mask.of_heads(head_mask, query)
    pairs, terms = resolve_terms(
        "sigmoid_attention",
        query,
        key,
        value,
        softcap=softcap,
        attn_mask=attn_mask,
        distance_bias=distance_bias,
        row_bounds=_head_mask.bounds(of_heads, row_bounds, key),
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    lengths = _arguments.key_lengths(seqused_k, leftpad_k, query, key)
    output = _ops.sigmoid_attention(
        query, key, value, *lengths, s.bias, alibi_slopes, s.bias_rule, s.bias_value, *pairs, *terms, scale, *mask
    )
    return _head_mask.apply(of_heads, output)


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: SigmoidBias = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    has_padding: bool = False,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """:func:`sigmoid_attention` over sequences of different lengths, packed end to end.

    Args:
        query: (total_q, heads, head_dim); sequence b is rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``.
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_dim).
        cu_seqlens_q: (batch + 1,) int32, or int64, of which a copy is made, rising from 0 to total_q.
        cu_seqlens_k: (batch + 1,) likewise, rising from 0 to total_k.
        max_seqlen_q: at least the longest query sequence.
        max_seqlen_k: at least the longest key sequence.
        has_padding: the offsets may end below total_q and total_k, as in buffers of a fixed size. The rows after the
            last sequence are padding: their output and gradients are 0, and what they hold has no effect.

    On the GPU, where it would wait for the device, nothing checks what the offsets hold or that no sequence is longer
    than promised: with wrong ones the kernels read and write out of bounds. ``ATTNX_DEBUG=1`` in the environment has
    them checked there as on the CPU.

    The other arguments are those of :func:`sigmoid_attention`; ``bias=None`` means -log of each sequence's own
    key length, and masks are aligned to each sequence's own end. ``key_bias`` and ``key_mask`` are
    (heads or 1, total_k), and ``head_mask`` is (heads,) or (batch, heads); heads of factor 0 are computed.

    Returns:
        (total_q, heads, value_dim) in the dtype of query.
    """
    _shards.expect_whole("sigmoid_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(alibi_slopes=alibi_slopes)
    packing = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    padding = _arguments.flag("has_padding", has_padding)
    of_rows = _head_mask.of_rows(head_mask, query, packing[0])
    query, scale = _arguments.with_scale(query, scale)
    mask = _mask(is_causal, window, position_offset)
    s = resolve_score("sigmoid", bias, tensor_bias=True)
    _, terms = resolve_terms(
        "sigmoid_attention_varlen",
        query,
        key,
        value,
        softcap=softcap,
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    output = _ops.sigmoid_attention_varlen(
        query, key, value, *packing, padding, s.bias, alibi_slopes, s.bias_rule, s.bias_value, *terms, scale, *mask
    )
    return _head_mask.apply(of_rows, output)


@overload
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: Literal[True], **options: Unpack[DenseOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: bool, **options: Unpack[DenseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@takes_layouts
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    distance_bias: Tensor | None = None,
    row_bounds: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, the baseline of the other operators, on the same loop.

    Arguments are those of :func:`sigmoid_attention`; ``is_causal`` is aligned bottom-right (PyTorch's
    ``scaled_dot_product_attention`` aligns top-left: the two agree where length_q equals length_k).

    Args:
        sink: (heads,) or (), float32 (float64 for float64 inputs): one more logit of every row of a head, which takes
            weight and has no value, as the ``sinks`` of gpt-oss. It may require a gradient. -inf has no effect, and
            +inf takes all weight.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query; with ``return_logsumexp`` also
        :math:`\log (e^{\text{sink}_h} + \sum_j e^{\text{logit}_{ij}})` as (batch, heads, length_q), float32 (float64
        for float64). A row that sees no key gives 0, and a logsumexp of the sink, or -inf; a head of
        ``head_mask`` 0 gives 0 and -inf. Both are differentiable.

    Source of the sink: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925.
    """
    _arguments.flag("enable_gqa", enable_gqa)
    if isinstance(query, Tensor) and query.is_nested:
        options: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "window": window, "sink": sink}
        options |= {
            "position_offset": position_offset,
            "alibi_slopes": alibi_slopes,
            "return_logsumexp": return_logsumexp,
        }
        options |= {"softcap": softcap, "dropout_p": dropout_p, "generator": generator, "seed": seed, "offset": offset}
        _nested.expect_no_lengths(seqused_k=seqused_k, leftpad_k=leftpad_k)
        _refuse_beside_nested(
            attn_mask=attn_mask,
            distance_bias=distance_bias,
            row_bounds=row_bounds,
            key_bias=key_bias,
            key_mask=key_mask,
        )
        options["head_mask"] = head_mask
        return _nested.attend(softmax_attention_varlen, query, key, value, **options)
    if (ring := _shards.ring("softmax_attention")) is not None:
        _shards.expect_nothing(seqused_k=seqused_k, leftpad_k=leftpad_k, attn_mask=attn_mask, row_bounds=row_bounds)
        _shards.expect_nothing(distance_bias=distance_bias, dropout_p=dropout_p, head_mask=head_mask)
        results: Tensor | tuple[Tensor, Tensor] = ring(
            query,
            key,
            value,
            scale=scale,
            is_causal=is_causal,
            window=window,
            position_offset=position_offset,
            alibi_slopes=alibi_slopes,
            sink=sink,
            softcap=softcap,
            key_bias=key_bias,
            key_mask=key_mask,
            return_logsumexp=return_logsumexp,
        )
        return results
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(alibi_slopes=alibi_slopes, sink=sink)
    query, scale = _arguments.with_scale(query, scale)
    mask = _mask(is_causal, window, position_offset)
    of_heads = _head_mask.of_heads(head_mask, query)
    pairs, terms = resolve_terms(
        "softmax_attention",
        query,
        key,
        value,
        softcap=softcap,
        attn_mask=attn_mask,
        distance_bias=distance_bias,
        row_bounds=_head_mask.bounds(of_heads, row_bounds, key),
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    lengths = _arguments.key_lengths(seqused_k, leftpad_k, query, key)
    output, logsumexp = _ops.softmax_attention(
        query, key, value, *lengths, alibi_slopes, sink, *pairs, *terms, scale, *mask
    )
    output = _head_mask.apply(of_heads, output)
    return (output, _head_mask.hide(of_heads, logsumexp)) if return_logsumexp else output


@overload
def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...
@overload
def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_logsumexp: bool,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def softmax_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    window: Window = None,
    position_offset: int = 0,
    has_padding: bool = False,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`softmax_attention` over packed sequences, laid out as in :func:`sigmoid_attention_varlen`.

    Returns:
        (total_q, heads, value_dim) in the dtype of query; with ``return_logsumexp`` also (heads, total_q), which is
        -inf for padding.
    """
    _shards.expect_whole("softmax_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(alibi_slopes=alibi_slopes, sink=sink)
    packing = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    padding = _arguments.flag("has_padding", has_padding)
    of_rows = _head_mask.of_rows(head_mask, query, packing[0])
    query, scale = _arguments.with_scale(query, scale)
    mask = _mask(is_causal, window, position_offset)
    _, terms = resolve_terms(
        "softmax_attention_varlen",
        query,
        key,
        value,
        softcap=softcap,
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    output, logsumexp = _ops.softmax_attention_varlen(
        query, key, value, *packing, padding, alibi_slopes, sink, *terms, scale, *mask
    )
    output = _head_mask.apply(of_rows, output)
    return (output, _head_mask.hide(of_rows, logsumexp)) if return_logsumexp else output


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | FlexBlockMask,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[BlockSparseOptions],
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | FlexBlockMask,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[BlockSparseOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | FlexBlockMask,
    *,
    return_logsumexp: bool,
    **options: Unpack[BlockSparseOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@takes_layouts
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | FlexBlockMask,
    *,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    block_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    distance_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over the blocks of keys that a mask lists for each block of queries.

    Args:
        query: (batch, heads, length_q, head_dim).
        key: (batch, kv_heads, length_k, head_dim); heads is a multiple of kv_heads.
        value: (batch, kv_heads, length_k, value_dim).
        block_mask: :class:`attnx.BlockMask`, or a mask of ``torch.nn.attention.flex_attention``, which is converted at
            every call (:meth:`attnx.BlockMask.from_flex`). Its leading sizes are batch or 1, and heads or 1. What it
            hides within its blocks is hidden besides what other arguments hide. Counts above the width and indices of
            blocks that are not there are refused where the lists lie in host memory, and on the GPU under
            ``ATTNX_DEBUG=1``; otherwise they are undefined there, as looking would wait for the device.
        block_bias: float32 like ``block_mask.kv_indices``, or 1 in the place of batch or heads, added to every logit of
            the block. It may require a gradient.
        sink: with the softmax score, as in :func:`attnx.softmax_attention`.
        softcap, attn_mask, distance_bias, key_bias, key_mask, dropout_p, generator, seed, offset: as in
            :func:`attnx.sigmoid_attention`.
        scale, enable_gqa: of :func:`attnx.sigmoid_attention`; so are the layouts of query, key and value.
        is_causal: also hide later keys, aligned bottom-right.
        seqused_k: as in :func:`attnx.sigmoid_attention`; the mask may list blocks beyond.
        leftpad_k: likewise; the blocks of keys of a sequence, and the mask's bounds of rows, count from there.
        return_logsumexp: with the softmax score, also return (batch, heads, length_q) float32.

    Returns:
        (batch, heads, length_q, value_dim) in the dtype of query. A row that sees no key gives 0.

    Raises:
        RuntimeError: an argument of the wrong shape, dtype or value, by its name.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.
    """
    _shards.expect_whole("block_sparse_attention")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(block_bias=block_bias, sink=sink)
    _arguments.flag("enable_gqa", enable_gqa)
    _arguments.flag("is_causal", is_causal)
    if not isinstance(block_mask, BlockMask):
        if not hasattr(block_mask, "mask_mod"):
            raise RuntimeError(f"block_mask: expected attnx.BlockMask or flex_attention's, got {type(block_mask)}")
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "block_mask: expected attnx.BlockMask under torch.compile, got one of flex_attention; convert it once, "
                "outside, with attnx.BlockMask.from_flex"
            )
        block_mask, causal = BlockMask.from_flex(block_mask)
        is_causal = is_causal or causal
    check_lengths("block_mask", block_mask.lengths, query, key)
    query, scale = _arguments.with_scale(query, scale)
    s = resolve_score(score, bias, sink=sink, return_logsumexp=return_logsumexp)
    pairs, terms = resolve_terms(
        "block_sparse_attention",
        query,
        key,
        value,
        softcap=softcap,
        attn_mask=block_mask.with_elements(attn_mask),
        distance_bias=distance_bias,
        row_bounds=block_mask.row_bounds,
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    output, logsumexp = _ops.block_sparse_attention(
        query,
        key,
        value,
        *_arguments.key_lengths(seqused_k, leftpad_k, query, key),
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_bias,
        sink,
        *pairs,
        *terms,
        *block_mask.block_size,
        s.score,
        s.bias_rule,
        s.bias_value,
        scale,
        is_causal,
    )
    return (output, logsumexp) if return_logsumexp else output


@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_mask: BlockMask,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[PackedBlockSparseOptions],
) -> Tensor: ...
@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_mask: BlockMask,
    *,
    return_logsumexp: Literal[True],
    **options: Unpack[PackedBlockSparseOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_mask: BlockMask,
    *,
    return_logsumexp: bool,
    **options: Unpack[PackedBlockSparseOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def block_sparse_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_mask: BlockMask,
    *,
    score: ScoreName = "softmax",
    bias: SigmoidBias = None,
    block_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | Tensor | None = None,
    is_causal: bool = False,
    has_padding: bool = False,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`block_sparse_attention` over packed sequences, laid out as in :func:`sigmoid_attention_varlen`.

    Args:
        block_mask: lists of (sequences or 1, heads or 1, query_blocks), where query_blocks are the blocks of
            ``max_seqlen_q``. The blocks of a sequence count from its own first query and key; rows and blocks beyond
            its end have no effect. Lists that ascend, as those of :meth:`attnx.BlockMask.from_dense` do, may serve
            sequences of several lengths. A mask that hides elements within its blocks is refused.
        block_bias: as in :func:`block_sparse_attention`, with sequences in the place of batch.
        score, bias, sink: as in :func:`block_sparse_attention`.
        scale, is_causal, has_padding, softcap, key_bias, key_mask, dropout_p, generator, seed, offset: as in
            :func:`softmax_attention_varlen`.

    Returns:
        (total_q, heads, value_dim) in the dtype of query; with ``return_logsumexp``, which the softmax score has, also
        (heads, total_q), which is -inf for padding.

    Raises:
        RuntimeError: an argument of the wrong shape, dtype or value, by its name.
        NotImplementedError: no kernel for these arguments on this device; the message names what is missing.
    """
    _shards.expect_whole("block_sparse_attention_varlen")
    _arguments.tensors(query=query, key=key, value=value)
    _arguments.optional_tensors(block_bias=block_bias, sink=sink)
    packing = _arguments.packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    padding = _arguments.flag("has_padding", has_padding)
    _arguments.flag("is_causal", is_causal)
    _check_packed_mask(block_mask, packing[2:])
    query, scale = _arguments.with_scale(query, scale)
    s = resolve_score(score, bias, sink=sink, return_logsumexp=return_logsumexp)
    _, terms = resolve_terms(
        "block_sparse_attention_varlen",
        query,
        key,
        value,
        softcap=softcap,
        key_bias=key_bias,
        key_mask=key_mask,
        dropout_p=dropout_p,
        generator=generator,
        seed=seed,
        offset=offset,
    )
    output, logsumexp = _ops.block_sparse_attention_varlen(
        query,
        key,
        value,
        *packing,
        padding,
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_bias,
        sink,
        *terms,
        *block_mask.block_size,
        s.score,
        s.bias_rule,
        s.bias_value,
        scale,
        is_causal,
    )
    return (output, logsumexp) if return_logsumexp else output


def _check_packed_mask(block_mask: BlockMask, longest: tuple[int, int]) -> None:
    if not isinstance(block_mask, BlockMask):
        _arguments.refuse("block_mask", "attnx.BlockMask", block_mask)
    if block_mask.row_bounds is not None or block_mask.attn_mask is not None:
        raise RuntimeError(
            "block_mask: expected lists alone for packed sequences, got a mask that hides elements within its blocks"
        )
    if block_mask.lengths not in (None, longest):
        raise RuntimeError(
            f"block_mask: expected one of max_seqlen_q and max_seqlen_k, {longest}, or of no lengths, got one of "
            f"{block_mask.lengths}"
        )
