"""Softmax attention and the gated delta rule, chunk by chunk, as a module."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnx.block_mask import BlockMask
from attnx.delta_rule import gated_delta_rule
from attnx.functional import block_sparse_attention, softmax_attention
from attnx.merging import merge_attention
from attnx.nn.gated_delta_net import log_decays
from attnx.nn.projections import positive
from attnx.nn.stateful import State, StatefulAttention, sum_dtype

__all__ = ["HybridChunkAttention"]

CHUNK = 64

_rule = functools.partial(gated_delta_rule, normalize_qk=True)


class HybridChunkAttention(StatefulAttention):
    r"""NAtS-L: each chunk of 64 tokens is remembered by its keys and values, or by the state of the gated delta rule.

    A router reads the mean of a chunk's tokens and makes it, for each group of heads, a softmax chunk or a linear one:
    that of the larger logit. Every token attends by softmax to the keys of earlier softmax chunks and to those of its
    own chunk up to itself. By the gated delta rule, with queries and keys of norm 1, it reads a state that takes linear
    chunks on, and passes softmax chunks by decay alone (``carry`` of :func:`attnx.gated_delta_rule`); the tokens of its
    own chunk up to itself are in that state, too, of whichever type the chunk is. The output of a head is

    .. math:: (w_1 \text{RMSNorm}(o_\text{linear}) + w_2 \text{RMSNorm}(o_\text{softmax})) \; \text{silu}(W_g x)
        \qquad (w_1, w_2) = \text{softmax}(W_w q)

    The router learns by straight-through estimation: a chunk's type counts as a one-hot number, which has the gradient
    of the softmax of the logits. That of a softmax chunk is the sum of the gradients of its keys' logits, that of the
    linear type is the gradient of ``carry``, of softmax chunks, too. What a linear chunk would be as a softmax chunk is
    not looked at. :meth:`forward` has these gradients, :meth:`prefill` and :meth:`step` have those of all else.

    Args:
        embed_dim: features of a token.
        num_heads: heads.
        head_dim: features of a query, a key and a value; embed_dim / num_heads by default.
        num_groups: groups of consecutive heads that share the types of chunks, a divisor of num_heads; num_heads by
            default.
        norm_eps: of all norms.
        device, dtype: of the parameters.

    Shapes:
        x: (batch, length, embed_dim).
        output: (batch, length, embed_dim).
        state: the state of the delta rule ahead of the chunk that is not full, and with its tokens, (batch, num_heads,
            head_dim, head_dim) each; the sum of these tokens, (batch, embed_dim), and of their log decays, (batch,
            num_heads); their keys and values, (batch, num_heads, tokens, head_dim) each; those of kept chunks, (batch,
            num_heads, 64 * chunks, head_dim) each, and how many keys each head has, int32 (batch, num_heads). What is
            no key or value is float32 (float64 for float64).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: "NAtS-L", arXiv 2602.03681. That the norms have weights, that types are those of groups of heads, and that
    one projection weighs both parts of all heads, are choices of ours.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_groups: int | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = positive("embed_dim", embed_dim), positive("num_heads", num_heads)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim} where head_dim is not given, got {num_heads}"
            )
        self.head_dim = positive("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        self.num_groups = positive("num_groups", num_heads if num_groups is None else num_groups)
        if num_heads % self.num_groups:
            raise ValueError(f"num_groups: expected a divisor of num_heads = {num_heads}, got {num_groups}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        features = num_heads * self.head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, **factory)

        self.q_proj, self.k_proj, self.v_proj = (linear(embed_dim, features) for _ in range(3))
        self.decay_proj, self.beta_proj = linear(embed_dim, num_heads), linear(embed_dim, num_heads)
        self.gate_proj, self.out_proj = linear(embed_dim, features), linear(features, embed_dim)
        self.router, self.mix_proj = linear(embed_dim, 2 * self.num_groups), linear(self.head_dim, 2)
        self.A_log = nn.Parameter(torch.empty(num_heads, **factory))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **factory))
        self.q_norm, self.k_norm, self.linear_norm, self.softmax_norm = (
            nn.RMSNorm(self.head_dim, eps=norm_eps, **factory) for _ in range(4)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives ``dt_bias`` and ``A_log`` their start; the submodules have a reset_parameters of their own."""
        nn.init.ones_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()

    def attend(self, x: Tensor, state: State | None, wants_state: bool) -> tuple[Tensor, State]:
        if not wants_state:
            return self._attend_to_all(x), ()
        before = self._start(x) if state is None else state
        # A chunk that is not full is filled up first, so that pieces begin with chunks or lie within one.
        missing = -before[4].shape[2] % CHUNK
        if not 0 < missing < x.shape[1]:
            return self._attend_to_piece(x, before)
        first, between = self._attend_to_piece(x[:, :missing], before)
        rest, after = self._attend_to_piece(x[:, missing:], between)
        return torch.cat((first, rest), 1), after

    def routes(self, x: Tensor) -> Tensor:
        """Tells which chunks are softmax chunks.

        Args:
            x: (batch, length, embed_dim).

        Returns:
            bool (batch, num_groups, length // 64); a chunk that is not full has no type yet.
        """
        logits = self._logits(_means(x))
        return logits[..., 0] >= logits[..., 1]

    def _logits(self, means: Tensor) -> Tensor:
        """(batch, num_groups, chunks, 2), of the types softmax and linear, from (batch, chunks, embed_dim)."""
        return self.router(means).unflatten(2, (-1, 2)).transpose(1, 2)

    def _of_heads(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.num_heads // self.num_groups, 1)

    def _attend_to_all(self, x: Tensor) -> Tensor:
        """Attends within a whole sequence, with gradients of the types of chunks."""
        rows = self._project(x)
        logits = self._logits(_means(x)).to(rows.beta.dtype)
        types = F.one_hot((logits[..., 0] < logits[..., 1]).long(), 2).to(logits.dtype)
        learned = logits.softmax(-1)
        learned = self._of_heads(types + (learned - learned.detach()))
        missing = -(-x.shape[1] // CHUNK) - learned.shape[2]  # 1 where the last chunk is not full, and has no type
        linear = _rule(*rows.of_rule(), carry=F.pad(learned[..., 1], (0, missing)))
        kept = self._of_heads(types[..., 0])
        # It is 0, and its gradient is the sum of those of the keys' logits.
        bias = F.pad(kept * (learned[..., 0] - kept), (0, missing)).repeat_interleave(CHUNK, 2)[..., : x.shape[1]]
        mask = _visited_chunks(F.pad(kept, (0, missing)) > 0, x.shape[1])
        softmax = block_sparse_attention(
            rows.query, rows.key, rows.value, mask, is_causal=True, key_bias=bias if bias.requires_grad else None
        )
        assert isinstance(softmax, Tensor)
        return self._mix(x, rows, linear, softmax)

    def _attend_to_piece(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Attends from tokens that begin a chunk, or lie within one."""
        before, now, token_sum, decay_sum, own_key, own_value, kept_key, kept_value, kept_count = state
        started, rows = own_key.shape[2], self._project(x)
        key, value = torch.cat((own_key, rows.key), 2), torch.cat((own_value, rows.value), 2)
        full = key.shape[2] // CHUNK * CHUNK
        token_sums, decay_sums = x.to(token_sum.dtype), rows.log_decay
        if started:
            # One more chunk at most becomes full; its tokens are counted as one.
            means = (token_sum + token_sums.sum(1))[:, None].expand(-1, full // CHUNK, -1) / CHUNK
        else:
            means = _means(token_sums)
        logits = self._logits(means.to(x.dtype))
        is_softmax = self._of_heads(logits[..., 0] >= logits[..., 1])

        if started:
            linear, now = _rule(*rows.of_rule(), initial_state=now, return_state=True)
            decay_sum = decay_sum + decay_sums.sum(2)
            if full:
                before = now.where(~is_softmax[..., None], before * decay_sum.exp()[..., None, None])
        else:
            carry = is_softmax.logical_not().to(before.dtype)
            whole, rest = rows.of_rule(stop=full), rows.of_rule(start=full)
            linear, before = _rule(*whole, initial_state=before, carry=carry, return_state=True)
            last, now = _rule(*rest, initial_state=before, return_state=True)
            linear, decay_sum = torch.cat((linear, last), 2), decay_sums[:, :, full:].sum(2)
        softmax = self._attend_to_kept(rows.query, key, value, is_softmax, (kept_key, kept_value, kept_count))

        if full:
            now = before if full == key.shape[2] else now
            kept_key, _ = _keep(kept_key, kept_count, key[:, :, :full], is_softmax)
            kept_value, kept_count = _keep(kept_value, kept_count, value[:, :, :full], is_softmax)
            token_sum = torch.zeros_like(token_sum)
            decay_sum = decay_sum if not started else torch.zeros_like(decay_sum)
        token_sum = token_sum + token_sums[:, max(full - started, 0) :].sum(1)
        own_key, own_value = key[:, :, full:].clone(), value[:, :, full:].clone()
        after = (before, now, token_sum, decay_sum, own_key, own_value, kept_key, kept_value, kept_count)
        return self._mix(x, rows, linear, softmax), after

    def _attend_to_kept(
        self, query: Tensor, key: Tensor, value: Tensor, is_softmax: Tensor, kept: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Softmax attention to the keys of this piece and its chunk, and to those kept of earlier chunks."""
        recent: Any
        if key.shape[2] <= CHUNK:
            recent = softmax_attention(query, key, value, is_causal=True, return_logsumexp=True)
        else:
            types = F.pad(is_softmax, (0, -(-key.shape[2] // CHUNK) - is_softmax.shape[2]))
            mask = _visited_chunks(types, key.shape[2])
            recent = block_sparse_attention(query, key, value, mask, is_causal=True, return_logsumexp=True)
        kept_key, kept_value, count = kept
        if kept_key.shape[2] == 0:
            return recent[0]
        # Heads keep unequal numbers of keys: each is a sequence of its own.
        of_heads = [y.flatten(0, 1)[:, None] for y in (query, kept_key, kept_value)]
        earlier: Any = softmax_attention(*of_heads, seqused_k=count.flatten(), return_logsumexp=True)
        of_kept = (y[:, 0].unflatten(0, query.shape[:2]) for y in earlier)
        return merge_attention(*zip(recent, of_kept, strict=True))[0]

    def _project(self, x: Tensor) -> _Rows:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        query, key, value = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        log_decay = log_decays(self.decay_proj(x).mT, self.A_log, self.dt_bias)
        beta = self.beta_proj(x).mT.to(log_decay.dtype).sigmoid()
        return _Rows(query, key, self.q_norm(query), self.k_norm(key), value, log_decay, beta)

    def _mix(self, x: Tensor, rows: _Rows, linear: Tensor, softmax: Tensor) -> Tensor:
        of_linear, of_softmax = self.mix_proj(rows.raw_query).softmax(-1).split(1, -1)
        mixed = of_linear * self.linear_norm(linear.to(x.dtype)) + of_softmax * self.softmax_norm(softmax)
        return self.out_proj(mixed.transpose(1, 2).flatten(2) * F.silu(self.gate_proj(x)))

    def _start(self, x: Tensor) -> State:
        """The state before any token."""
        sums, batch, heads = {"dtype": sum_dtype(x)}, x.shape[0], self.num_heads
        states = [x.new_zeros(batch, heads, self.head_dim, self.head_dim, **sums) for _ in range(2)]
        rows = [x.new_zeros(batch, heads, 0, self.head_dim) for _ in range(4)]
        return (
            *states,
            x.new_zeros(batch, self.embed_dim, **sums),
            x.new_zeros(batch, heads, **sums),
            *rows,
            x.new_zeros(batch, heads, dtype=torch.int32),
        )

    def state_shapes(self, batch: int) -> Sequence[tuple[int | None, ...]]:
        of_head = batch, self.num_heads
        of_rows = (*of_head, None, self.head_dim)
        states = [(*of_head, self.head_dim, self.head_dim)] * 2
        return [*states, (batch, self.embed_dim), of_head, of_rows, of_rows, of_rows, of_rows, of_head]

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"num_groups={self.num_groups}"
        )


class _Rows(NamedTuple):
    """What is made of tokens: (batch, heads, length, head_dim), and numbers of tokens (batch, heads, length)."""

    raw_query: Tensor
    raw_key: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor

    def of_rule(self, start: int | None = None, stop: int | None = None) -> tuple[Tensor, ...]:
        """What the gated delta rule takes of the tokens from the first to the last."""
        parts = (self.raw_query, self.raw_key, self.value, self.log_decay, self.beta)
        return tuple(y[:, :, start:stop] for y in parts)


def _means(x: Tensor) -> Tensor:
    """Of the tokens of each full chunk, (batch, chunks, features)."""
    chunks = x.shape[1] // CHUNK
    return x[:, : chunks * CHUNK].unflatten(1, (chunks, CHUNK)).mean(2)


def _visited_chunks(is_softmax: Tensor, length: int) -> BlockMask:
    """Each chunk of queries visits its own keys, and those of softmax chunks."""
    own = torch.eye(is_softmax.shape[2], dtype=torch.bool, device=is_softmax.device)
    earlier = torch.ones_like(own).tril(-1)
    return BlockMask.from_dense(own | (earlier & is_softmax[:, :, None]), (CHUNK, CHUNK), (length, length))


def _keep(kept: Tensor, count: Tensor, rows: Tensor, is_softmax: Tensor) -> tuple[Tensor, Tensor]:
    """The kept rows of each head, ``count`` of them, and those of new softmax chunks behind them."""
    chunks = torch.cat((kept, rows), 2).unflatten(2, (-1, CHUNK))
    before = torch.arange(kept.shape[2] // CHUNK, device=kept.device) < count[..., None] // CHUNK
    used = torch.cat((before, is_softmax), 2)
    total = used.sum(2, dtype=torch.int32)
    most = int(total.max()) if total.numel() else 0
    order = used.logical_not().to(torch.uint8).argsort(dim=2, stable=True)[..., :most, None, None]
    return chunks.gather(2, order.expand(-1, -1, -1, *chunks.shape[3:])).flatten(2, 3), total * CHUNK
