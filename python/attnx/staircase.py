"""The staircase KV cache: the older a token, the fewer bits its keys and values have."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from attnx import _arguments
from attnx._scores import ScoreName, SigmoidBias, resolve_score
from attnx._structures import register, register_named_tuple

__all__ = ["StaircaseCache", "staircase_attention"]

_ops = torch.ops.attnx

WIDTHS = (8, 4, 2, 1)
MOST_LEVELS = 32
MOST_RESIDUAL = 2**30
FORMAT = 1  # of what state_dict gives
BLOCK = 32  # rows and columns of codes that lie together


class _Plane(NamedTuple):
    bits: int
    windows: int  # that read it
    slots: int


class _Memory(NamedTuple):
    """As csrc/attnx/staircase.h lays it out."""

    state: Tensor  # (batch, 2 planes) int64
    codes: Tensor  # (batch, heads, 2, words) int32
    ranges: Tensor  # (batch, heads, 2, windows, window * head_dim / group, 2) float16
    tail: Tensor  # (batch, heads, 2, 2, window + residual, head_dim) in the dtype of the cache


def _planes(levels: Sequence[int], max_windows: int) -> list[_Plane]:
    """The first plane has the bits of the last level, and each further one doubles what stands before it."""
    planes, total = [_Plane(levels[-1], max_windows, max_windows)], 2 * levels[-1]
    while total <= levels[1]:
        windows = min(sum(level >= total for level in levels[1:]), max_windows)
        planes.append(_Plane(total // 2, windows, 2 * windows))
        total *= 2
    return planes


class StaircaseOptions(TypedDict, total=False):
    """These are for type checkers, which tell by ``return_logsumexp`` what comes back."""

    score: ScoreName
    scale: float | Tensor | None
    is_causal: bool
    bias: SigmoidBias
    query_lengths: Tensor | None


class StaircaseCache:
    r"""A KV cache of static shape whose tokens lose bits as they age, after Li's staircase adaptive quantisation
    (arXiv 2410.18441), with ranges as in KIVI (arXiv 2402.02750).

    The newest tokens, fewer than ``window``, stay as they came. When they fill a window, every window falls one step:
    the m-th newest full window has ``levels[m]`` bits, and everything older the last level's. Keys are quantised by
    channel over groups of tokens, values by token over groups of channels:

    .. math:: c_8 = \lfloor (x - \mathrm{min}) / \mathrm{step} \rfloor \in [0, 255], \qquad
              c_b = \lfloor c_8 / 2^{8-b} \rfloor, \qquad
              \hat x = \mathrm{min} + (c_b + 1/2)\, 2^{8-b}\, \mathrm{step}

    with the minimum of a group rounded down to float16 and step, a 256th of its range, rounded up. Codes are nested: to
    fall is to stop reading the lower bits. So what a token became does not depend on how it came there, errors do not
    add up, and are at most 2^(7-b) steps. Memory is allocated once, an append writes its own tokens only, and one that
    fails leaves the cache as it was.

    Several threads may use one cache: their calls take turns, but for :meth:`attend`, of which many run together. Each
    works on one state, the one before or the one after a call that changes the cache. On a GPU the streams of these
    threads must be in order, as with any tensor. What :meth:`state_dict` gives is the cache's memory itself, which
    later calls change; and a step that was compiled does not wait for a call that moves the memory (:meth:`expand`, and
    :meth:`reorder` to another number of sequences).

    Inference only: nothing is differentiated. On a GPU lengths and numbers are known there alone, and nothing waits for
    them: an append or a crop that does not fit a sequence leaves that sequence as it was, and with ``ATTNX_DEBUG=1``
    it is refused as on the CPU.

    Args:
        batch_size: sequences; each has its own length.
        num_kv_heads: heads of keys and values.
        head_dim: their features, a multiple of ``group`` up to 256.
        max_length: the most tokens of a sequence.
        levels: bits by age: 16, which stands for the dtype, then any of 8, 4, 2 and 1, none larger than the one before.
        window: tokens of a step, a multiple of ``group``.
        group: how many numbers share a range, a multiple of 32.
        residual: at least so many of the newest tokens never fall: a window falls once it is full and older.
        dtype: float32, bfloat16 or float16, of keys, values and queries; torch's default dtype if None.
        device: where the memory is.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """

    _lock: AbstractContextManager[Any]

    # However a cache is made, as a copy, from a pickle or from the leaves of a tree, it has a lock of its own.
    def __new__(cls, *args: object, **options: object) -> StaircaseCache:
        cache = super().__new__(cls)
        cache._lock = threading.RLock()
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_lock"}

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        *,
        levels: Sequence[int] = (16, 8, 4, 2),
        window: int = 128,
        group: int = 32,
        residual: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        levels = tuple(_arguments.integer("levels", level) for level in levels)
        batch_size = _arguments.integer("batch_size", batch_size)
        num_kv_heads = _arguments.integer("num_kv_heads", num_kv_heads)
        head_dim, max_length = _arguments.integer("head_dim", head_dim), _arguments.integer("max_length", max_length)
        window, group = _arguments.integer("window", window), _arguments.integer("group", group)
        residual = _arguments.integer("residual", residual)
        _check(batch_size, num_kv_heads, head_dim, max_length, levels, window, group, residual, dtype)
        self.levels, self.window, self.group, self.max_length = levels, window, group, max_length
        self.residual = residual
        max_windows = self._windows(max_length)
        words = sum(plane.slots * window * head_dim * plane.bits // 32 for plane in self._planes)
        outer = batch_size, num_kv_heads, 2
        self._memory = _Memory(
            state=torch.zeros(batch_size, 2 * len(self._planes), dtype=torch.int64, device=device),
            codes=torch.zeros(*outer, words, dtype=torch.int32, device=device),
            ranges=torch.zeros(*outer, max_windows, window * head_dim // group, 2, dtype=torch.float16, device=device),
            tail=torch.zeros(*outer, 2, window + residual, head_dim, dtype=dtype, device=device),
        )

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self._memory.tail.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self._memory.tail.shape[1]

    @property
    def head_dim(self) -> int:
        return self._memory.tail.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self._memory.tail.dtype

    @property
    def device(self) -> torch.device:
        return self._memory.tail.device

    @property
    def lengths(self) -> Tensor:
        """(batch_size,) int64: the tokens of each sequence."""
        with self._alone():
            return self._memory.state[:, 0].clone()

    @property
    def length(self) -> int:
        """The tokens of the longest sequence."""
        with self._alone():
            return int(self._memory.state[:, 0].max()) if self.batch_size else 0

    @property
    def nbytes(self) -> int:
        r"""All memory of the cache, which no append changes. With S = window, W = (max_length - residual) // S full
        windows, the last level's b bits, and rings of bits p for the R newest windows,

        .. math:: 2 B H D\, [\, W S\, (b / 8 + 4 / \mathrm{group}) + \textstyle\sum 2 R S p / 8
                  + 2 (S + \mathrm{residual})\, \mathrm{itemsize}\,]

        and 16 bytes of each sequence for each plane of bits. Rings and the tail are there twice, so that an append
        never overwrites what the state before it reads.
        """
        return sum(x.numel() * x.element_size() for x in self._memory)

    def bits(self, sequence: int = 0) -> Tensor:
        """(length,) int64: how many bits the numbers of each token have, the oldest first."""
        sequence = _arguments.integer("sequence", sequence)
        with self._alone():
            if not 0 <= sequence < self.batch_size:
                raise RuntimeError(f"sequence: expected from 0 to {self.batch_size - 1}, got {sequence}")
            length, _, *refined = self._memory.state[sequence].tolist()
        age = self._windows(length) - torch.arange(length) // self.window  # below 1 in the tail
        bits = torch.full((length,), self.levels[-1])
        for plane, held in zip(self._planes[1:], refined[1::2], strict=True):
            bits += torch.where(age <= held, plane.bits, 0)
        return bits.where(age > 0, 8 * self._memory.tail.element_size())

    def __repr__(self) -> str:
        return (
            f"StaircaseCache(batch_size={self.batch_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, max_length={self.max_length}, levels={self.levels}, window={self.window}, "
            f"group={self.group}, residual={self.residual}, dtype={self.dtype}, device={self.device})"
        )

    # What it does ----------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, counts: Tensor | None = None) -> None:
        """Appends tokens to every sequence: all of them, or nothing where an error is raised.

        Args:
            key: (batch_size, num_kv_heads, tokens, head_dim), finite, of a magnitude up to 65504.
            value: like key.
            counts: (batch_size,) int64, how many of the tokens, the first ones, a sequence gets; all by default.

        Raises:
            RuntimeError: an argument does not fit, or a sequence would grow beyond ``max_length``.
        """
        _arguments.tensors(key=key, value=value)
        _arguments.optional_tensors(counts=counts)
        with self._alone():
            _ops.staircase_append_(*self._memory, key.detach(), value.detach(), counts, *self._layout)

    @overload
    def attend(
        self, query: Tensor, *, return_logsumexp: Literal[False] = False, **options: Unpack[StaircaseOptions]
    ) -> Tensor: ...
    @overload
    def attend(
        self, query: Tensor, *, return_logsumexp: Literal[True], **options: Unpack[StaircaseOptions]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(
        self, query: Tensor, *, return_logsumexp: bool, **options: Unpack[StaircaseOptions]
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attend(
        self,
        query: Tensor,
        *,
        score: ScoreName = "softmax",
        scale: float | Tensor | None = None,
        is_causal: bool = True,
        bias: SigmoidBias = None,
        query_lengths: Tensor | None = None,
        return_logsumexp: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """:func:`attnx.staircase_attention` with this cache: append the new tokens first, then attend."""
        return staircase_attention(
            query,
            self,
            score=score,
            scale=scale,
            is_causal=is_causal,
            bias=bias,
            query_lengths=query_lengths,
            return_logsumexp=return_logsumexp,
        )

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them: (batch_size, num_kv_heads, length, head_dim) in the dtype of the
        cache, 0 beyond the end of a shorter sequence."""
        with self._alone():
            return _ops.staircase_dequantize(*self._memory, 0, self.length, *self._layout)

    def crop(self, length: int | Tensor) -> None:
        """Drops the last tokens of every sequence, as when speculated ones are rejected.

        Bits that fell do not come back. Within the tail nothing is lost. Where whole windows are dropped, the windows
        that stay keep the bits they have, though younger now; and what is left of a window that was cut open becomes
        the tail, with the numbers it was quantised to, from which it is quantised again when it fills.

        Args:
            length: the tokens to keep of every sequence, or of each, (batch_size,) int64; a negative number drops so
                many.

        Raises:
            RuntimeError: a sequence has fewer tokens; the cache is as it was.
        """
        if not isinstance(length, Tensor):
            length = _arguments.integer("length", length)
        with self._alone():
            if not isinstance(length, Tensor):
                length = torch.full((self.batch_size,), length, dtype=torch.int64, device=self.device)
            _ops.staircase_crop_(*self._memory, length, *self._layout)

    def reorder(self, sequences: Tensor) -> None:
        """Makes sequence i the one that was sequence ``sequences[i]``, as beam search does: (new batch_size,) int64 or
        int32.

        As many sequences as before stay in the same memory, so that a CUDA graph and compiled code go on with them;
        another number of them moves to new memory. A second memory is taken meanwhile. Indices on a GPU are not looked
        at here, as that would wait for it; PyTorch reports those that are out of range there.
        """
        _arguments.tensors(sequences=sequences)
        if sequences.dtype not in (torch.int64, torch.int32) or sequences.dim() != 1:
            raise RuntimeError(
                f"sequences: expected one dimension of int64 or int32, got {tuple(sequences.shape)} of "
                f"{sequences.dtype}"
            )
        least, most = 0, -1
        if sequences.device.type == "cpu" and sequences.numel() and not torch.compiler.is_compiling():
            least, most = int(sequences.min()), int(sequences.max())
        with self._alone():
            if not 0 <= least <= most + 1 <= self.batch_size:
                raise RuntimeError(f"sequences: expected from 0 to {self.batch_size - 1}, got {sequences.tolist()}")
            self._assign(_Memory(*(x.index_select(0, sequences.to(x.device)) for x in self._memory)))

    def expand(self, beams: int) -> None:
        """Makes so many sequences of each, one after the other, as the start of a beam search does."""
        beams = _arguments.integer("beams", beams)
        if beams < 1:
            raise RuntimeError(f"beams: expected at least 1, got {beams}")
        with self._alone():
            self.reorder(torch.arange(self.batch_size, device=self.device).repeat_interleave(beams))

    def to(self, device: torch.device | str) -> StaircaseCache:
        """This cache where it is there, or else a copy there. The memory means the same on every device."""
        with self._alone():
            moved = _Memory(*(x.to(device) for x in self._memory))
            return self if moved.tail is self._memory.tail else self._with(moved)

    def cpu(self) -> StaircaseCache:
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int = "cuda") -> StaircaseCache:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device)

    def __deepcopy__(self, memo: dict[int, Any]) -> StaircaseCache:
        with self._alone():
            return self._with(copy.deepcopy(self._memory, memo))

    def state_dict(self) -> dict[str, Any]:
        """The cache's tensors, not copied, and what they mean, for :meth:`load_state_dict`."""
        return self._memory._asdict() | self._config()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` of a cache like this one gave, on whatever device.

        Raises:
            RuntimeError: that cache had another format, other levels, sizes or dtype, or its state is none that the
                operators lead to; the cache is as it was.
        """
        with self._alone():
            self._load_state_dict(state)

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        for name, expected in self._config().items():
            if state.get(name) != expected:
                raise RuntimeError(f"state: expected {name} {expected}, got {state.get(name)}")
        for name, x in self._memory._asdict().items():
            new = state.get(name)
            if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
                got = f"{tuple(new.shape)} of {new.dtype}" if isinstance(new, Tensor) else repr(new)
                raise RuntimeError(f"state: expected {name} {tuple(x.shape)} of {x.dtype}, got {got}")
        self._refuse_unreachable(state["state"])
        own = self._memory._asdict().items()  # whose strides stay, whatever those of the state are
        self._assign(_Memory(*(torch.empty_like(x).copy_(state[name].detach()) for name, x in own)))

    def _refuse_unreachable(self, state: Tensor) -> None:
        """Has the operators look at the state alone: reading no token, they read nothing of the rest."""
        rest = (torch.empty_like(x, device="cpu") for x in self._memory[1:])
        _ops.staircase_dequantize(state.cpu(), *rest, 0, 0, *self._layout)

    def _alone(self) -> AbstractContextManager[Any]:
        """Within it no other thread changes the cache. A compiler could not trace a lock; the operators have another
        one, of the memory."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _assign(self, memory: _Memory) -> None:
        """Takes over what another memory holds, into the own one where there are as many sequences."""
        if memory.tail.shape == self._memory.tail.shape:
            _ops.staircase_assign_(*self._memory, *memory, *self._layout)
        else:
            self._memory = memory

    def _with(self, memory: _Memory) -> StaircaseCache:
        """A cache like this one of other memory."""
        cache = copy.copy(self)
        cache._memory = memory
        return cache

    def _windows(self, length: int) -> int:
        """How many windows have fallen of so many tokens."""
        return max(length - self.residual, 0) // self.window

    @property
    def _planes(self) -> list[_Plane]:
        return _planes(self.levels, self._windows(self.max_length))

    @property
    def _layout(self) -> tuple[list[int], int, int, int, int]:
        return list(self.levels), self.window, self.group, self.residual, self.max_length

    def _config(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "levels": self.levels,
            "window": self.window,
            "group": self.group,
            "residual": self.residual,
            "max_length": self.max_length,
        }


register_named_tuple(_Memory, "attnx.StaircaseCache.memory")
register(StaircaseCache, leaves=("_memory",), constants=("levels", "window", "group", "residual", "max_length"))


@overload
def staircase_attention(
    query: Tensor,
    cache: StaircaseCache,
    *,
    return_logsumexp: Literal[False] = False,
    **options: Unpack[StaircaseOptions],
) -> Tensor: ...
@overload
def staircase_attention(
    query: Tensor, cache: StaircaseCache, *, return_logsumexp: Literal[True], **options: Unpack[StaircaseOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def staircase_attention(
    query: Tensor, cache: StaircaseCache, *, return_logsumexp: bool, **options: Unpack[StaircaseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def staircase_attention(
    query: Tensor,
    cache: StaircaseCache,
    *,
    score: ScoreName = "softmax",
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    bias: SigmoidBias = None,
    query_lengths: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a staircase cache, unpacked tile by tile inside the loop.

    The last query of a sequence stands at its last token. What it computes is attention over ``cache.dequantize()``,
    on a GPU before its numbers are rounded to the dtype.

    Args:
        query: (batch_size, heads, length_q, head_dim) in the dtype of the cache; heads is a multiple of its heads, and
            consecutive query heads share a key head, which is read once for all of them.
        cache: the keys and values, those of the queries among them.
        score: what turns a logit into a weight.
        scale: factor on query . key, 1/sqrt(head_dim) by default; or a tensor as in :func:`attnx.sigmoid_attention`.
        is_causal: hide later keys, where several tokens are new.
        bias: of the sigmoid's logits, as in :func:`attnx.sigmoid_attention`; the default is -log(tokens).
        query_lengths: (batch_size,) int64, how many queries of each sequence there are, the first ones; all by default.
        return_logsumexp: return the logsumexp of every row, too; softmax only.

    Returns:
        (batch_size, heads, length_q, head_dim) in the dtype of ``query``, and with ``return_logsumexp`` the
        logsumexp, (batch_size, heads, length_q) in float32. 0 in rows beyond ``query_lengths``.

    Raises:
        RuntimeError: an argument does not fit, or the cache is empty; the message names it, what was expected and what
            came.
        NotImplementedError: no kernel serves the call; the message says what is supported.
    """
    _arguments.tensors(query=query)
    _arguments.optional_tensors(query_lengths=query_lengths)
    if not isinstance(cache, StaircaseCache):
        _arguments.refuse("cache", "attnx.StaircaseCache", cache)
    _arguments.flag("is_causal", is_causal)
    query, scale = _arguments.with_scale(query, scale)
    s = resolve_score(score, bias, return_logsumexp=return_logsumexp, tensor_bias=True)
    output, logsumexp = _ops.staircase_attention(
        query,
        *cache._memory,
        query_lengths,
        s.bias,
        *cache._layout,
        s.score,
        s.bias_rule,
        s.bias_value,
        scale,
        is_causal,
    )
    return (output, logsumexp) if return_logsumexp else output


def _check(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_length: int,
    levels: tuple[int, ...],
    window: int,
    group: int,
    residual: int,
    dtype: torch.dtype,
) -> None:
    def expect(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise RuntimeError(f"{name}: expected {expected}, got {got}")

    expect(batch_size >= 0, "batch_size", "at least 0", batch_size)
    expect(num_kv_heads >= 1, "num_kv_heads", "at least 1", num_kv_heads)
    expect(max_length >= 1, "max_length", "at least 1", max_length)
    falling = all(a >= b for a, b in itertools.pairwise(levels))
    expect(
        2 <= len(levels) <= MOST_LEVELS and levels[0] == 16 and set(levels[1:]) <= set(WIDTHS) and falling,
        "levels",
        f"16, then at least one of 8, 4, 2 and 1, none larger than the one before, at most {MOST_LEVELS} in all",
        levels,
    )
    expect(group >= BLOCK and group % BLOCK == 0, "group", f"a multiple of {BLOCK}", group)
    expect(window >= group and window % group == 0, "window", f"a multiple of group, {group}", window)
    expect(0 <= residual <= MOST_RESIDUAL, "residual", f"from 0 to {MOST_RESIDUAL}", residual)
    expect(32 <= head_dim <= 256, "head_dim", "from 32 to 256", head_dim)
    expect(head_dim % group == 0, "head_dim", f"a multiple of group, {group}", head_dim)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    expect(dtype in dtypes, "dtype", "one of float32, bfloat16, float16", dtype)
