"""Each attention of attnx takes the call of a model here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import attnx
from attnx._scores import ScoreName, SigmoidBias
from attnx.block_mask import BlockMask
from attnx.integrations.row_sigmoid import row_sigmoid_attention
from attnx.integrations.sparse_linear import SparseLinear
from attnx.integrations.transformers.call import Call
from attnx.nn.buffers import KeepsDtype
from attnx.probabilistic import Keep, Mode
from attnx.routing import Routing, move_centroids_in_backward


def softmax(call: Call) -> Tensor:
    return attnx.softmax_attention(call.query, call.key, call.value, sink=_sink(call), **call.options(), **call.terms())


def sigmoid(call: Call, bias: float | Literal["row"] = "row") -> Tensor:
    if call.sink is not None:
        raise NotImplementedError(
            f"{call.name}: the model has sinks (s_aux), and sigmoid weights have no sum to put them in"
        )
    terms = call.terms() | call.options()
    if bias != "row":
        return attnx.sigmoid_attention(call.query, call.key, call.value, bias=bias, **terms)
    return row_sigmoid_attention(call.query, call.key, call.value, **terms)


def _sink(call: Call) -> Tensor | None:
    return None if call.sink is None else call.sink.to(torch.promote_types(call.query.dtype, torch.float32))


def _bias(score: ScoreName, bias: SigmoidBias) -> SigmoidBias:
    """The bias of a sigmoid counts what each row sees, as a model is run on texts of any length."""
    return "row" if score == "sigmoid" and bias is None else bias


def _listed(call: Call, mask: BlockMask, score: ScoreName, bias: SigmoidBias) -> Tensor:
    """Attends over the blocks of a mask."""
    terms = call.terms()
    if score == "sigmoid" and terms["attn_mask"] is not None and not isinstance(bias, (int, float)):
        raise NotImplementedError(
            f"{call.name}: expected a float as bias where the model has a mask, whose keys {bias!r} does not count"
        )
    return attnx.block_sparse_attention(
        call.query, call.key, call.value, mask, score=score, bias=bias, sink=_sink(call), **call.options(), **terms
    )


class SparseLinearScore(SparseLinear):
    """Each sequence that the model's mask keeps apart attends to itself, with one projection for all."""

    implementation = "attnx_sparse_linear"

    def attend(self, call: Call) -> Tensor:
        call.refuse("dropout", "softcap", "s_aux", "position_bias", "sliding_window")
        if (packing := call.packing()) is None:
            return self(call.query, call.key, call.value, **call.options())
        query, key, value = packing.pack(call.query, call.key, call.value)
        output = self.packed(query, key, value, packing.varlen, scale=call.scale, is_causal=packing.is_causal)
        return packing.unpack(output)


class RoutingScore(KeepsDtype):
    """Each sequence that the model's mask keeps apart attends to itself within clusters.

    Keys are routed for themselves, so that a token is in the same clusters when it comes out of a cache.

    Args:
        num_heads, head_dim: of queries.
        num_clusters: of a head.
        routing, normalize_qk, score, bias: as in :func:`attnx.routing_attention`. With ``"topk"`` an output depends on
            later tokens.
        cluster_size: with ``"topk"``, by default length / num_clusters, rounded up.
        decay: of the centroids' moving average, which every backward in training moves.

    Source: Roy et al., arXiv 2003.05997.
    """

    implementation = "attnx_routing"
    keeps_dtype = ("centroids", "counts")
    centroids: Tensor
    counts: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_clusters: int,
        routing: Routing = "argmax",
        cluster_size: int | None = None,
        normalize_qk: bool = False,
        score: ScoreName = "softmax",
        bias: float | Literal["row"] | None = None,
        decay: float = 0.999,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"normalize_qk": normalize_qk, "score": score, "bias": bias}
        self.routing: Routing = routing
        self.cluster_size = cluster_size
        self.decay = decay
        shape = num_heads, num_clusters, head_dim
        self.register_buffer("centroids", torch.randn(shape, dtype=torch.float32, device=device))
        self.register_buffer("counts", torch.ones(shape[:2], dtype=torch.float32, device=device))
        # The operator checks its options here, before a model is trained with them.
        one, centroids = (torch.zeros(*n, head_dim, device="cpu") for n in ((1, 1, 1), (1, num_clusters)))
        self._within(one, one, one, centroids)

    def attend(self, call: Call) -> Tensor:
        call.refuse("dropout", "softcap", "s_aux", "position_bias", "sliding_window")
        if (packing := call.packing()) is None:
            query = self._moves(call, call.query, call.key)
            return self._within(query, call.key, call.value, self.centroids, **call.options())
        query, key, value = packing.pack(call.query, call.key, call.value)
        query = self._moves(call, *(x.transpose(0, 1)[None] for x in (query, key)))[0].transpose(0, 1)
        options: dict[str, Any] = {"scale": call.scale, "is_causal": packing.is_causal}
        if self.routing == "topk" and self.cluster_size is None:  # each sequence has a size of its own
            lengths = packing.lengths_q, packing.lengths_k, packing.lengths_k
            split = (x.transpose(0, 1)[None].split(n, 2) for x, n in zip((query, key, value), lengths, strict=True))
            outputs = [self._within(q, k, v, self.centroids, **options) for q, k, v in zip(*split, strict=True)]
            return packing.unpack(torch.cat(outputs, 2)[0].transpose(0, 1))
        options |= {"routing": self.routing, "cluster_size": self.cluster_size, "shared_qk": False, **self.options}
        output = attnx.routing_attention_varlen(query, key, value, *packing.varlen, self.centroids, **options)
        return packing.unpack(output)

    def _moves(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        if not (call.training and torch.is_grad_enabled()):
            return query
        return move_centroids_in_backward(query, key, self.centroids, self.counts, decay=self.decay, group=None)

    def _within(self, query: Tensor, key: Tensor, value: Tensor, centroids: Tensor, **options: Any) -> Tensor:
        size = self.cluster_size
        if self.routing == "topk" and size is None:
            size = -(-max(query.shape[2], key.shape[2]) // centroids.shape[1])
        return attnx.routing_attention(
            query,
            key,
            value,
            centroids,
            routing=self.routing,
            cluster_size=size,
            shared_qk=False,
            **self.options,
            **options,
        )


class ProbabilisticScore(nn.Module):
    """Attention is over blocks by chance in training, and dense otherwise.

    Args:
        keep, density, mode, importance, score, bias, block_size: as in :func:`attnx.probabilistic_attention`.

    Source: Fulu Li, arXiv 2410.18441.
    """

    implementation = "attnx_probabilistic"

    def __init__(
        self,
        *,
        keep: Keep = "harmonic",
        density: float | None = None,
        mode: Mode = "bernoulli",
        importance: bool = False,
        score: ScoreName = "softmax",
        bias: float | Literal["row"] | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> None:
        super().__init__()
        self.blocks: dict[str, Any] = {"keep": keep, "density": density, "mode": mode, "block_size": tuple(block_size)}
        self.options: dict[str, Any] = {"importance": importance, "score": score, "bias": _bias(score, bias)}
        one = torch.zeros(1, 1, 1, 1, device="cpu")
        attnx.probabilistic_attention(one, one, one, seed=0, offset=0, **self.blocks, **self.options)

    def attend(self, call: Call) -> Tensor:
        score, bias = self.options["score"], self.options["bias"]
        if not call.training:
            return softmax(call) if score == "softmax" else sigmoid(call, bias)
        blocks = {**self.blocks, "is_causal": call.is_causal_by_mask()}  # candidates are the same with a mask
        if not call.has_terms():
            return attnx.probabilistic_attention(
                call.query, call.key, call.value, scale=call.scale, **blocks, **self.options
            )
        if self.options["importance"]:
            raise NotImplementedError(
                f"{call.name}: importance=True has no mask, dropout, softcap and sinks, one of which the model asks for"
            )
        batch, heads, length_q, _ = call.query.shape
        mask = attnx.probabilistic_block_mask(
            batch, heads, length_q, call.key.shape[2], device=call.query.device, **blocks
        )
        return _listed(call, mask, score, bias)


class BlockSparseScore(nn.Module):
    """Attention is over listed blocks.

    Args:
        block_mask: a function of length_q, length_k and device that returns an :class:`attnx.BlockMask`, or one for
            all calls. In generation with a cache length_q counts the new tokens alone, and length_k those so far.
        score, bias: as in :func:`attnx.block_sparse_attention`.
    """

    implementation = "attnx_block_sparse"

    def __init__(
        self,
        *,
        block_mask: BlockMask | Callable[[int, int, torch.device], BlockMask],
        score: ScoreName = "softmax",
        bias: float | Literal["row"] | None = None,
    ) -> None:
        super().__init__()
        if not callable(block_mask) and not isinstance(block_mask, BlockMask):
            raise RuntimeError(
                "block_mask: expected attnx.BlockMask or a function of (length_q, length_k, device) that makes one, "
                f"got {type(block_mask)}"
            )
        self.block_mask = block_mask
        self.score: ScoreName = score
        self.bias = _bias(score, bias)
        one = torch.zeros(1, 1, 1, 1, device="cpu")
        attnx.block_sparse_attention(one, one, one, BlockMask.causal(1, device="cpu"), score=score, bias=self.bias)

    def attend(self, call: Call) -> Tensor:
        call = call.without_unused_keys()
        lengths, device = (call.query.shape[2], call.key.shape[2]), call.query.device
        mask = self.block_mask if isinstance(self.block_mask, BlockMask) else self.block_mask(*lengths, device)
        return _listed(call, mask.to(device), self.score, self.bias)
