"""Attention whose tokens go to one head each, as a module, and heads that are cut by how many tokens they get."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from attnx.nn.arguments import ProjectionArguments, shows_projection_arguments
from attnx.nn.projections import ProjectedAttention
from attnx.routing import Routes, routing_attention

__all__ = ["HeadRoutedAttention"]


@shows_projection_arguments
class HeadRoutedAttention(ProjectedAttention):
    r"""Multi-head attention in which a router sends each token to one head, and heads that few are sent to can be cut.

    .. math:: p = \mathrm{softmax}(W_r x), \qquad h = \arg\max_h p_h, \qquad y = p_h\, O^h W_o^h

    A head attends from its own tokens to all keys: a ragged list of query rows for each head, through the gathered rows
    of :func:`attnx.routing_attention`, so that attention costs what one head costs. The projections are of all heads.
    Of equal p the lower head counts. The router learns through :math:`p_h`.

    ``usage``, a buffer in float32, is the moving average of the share of tokens that each head gets. It starts at
    1 / num_heads; in training every backward moves it by ``1 - decay`` of the way to what the call has. :meth:`prune_`
    keeps the heads that are used most: the others are 0 in ``head_mask``, which is a buffer, too, and get no token from
    then on. A call costs no more for them; :meth:`compact` leaves their parameters out. Where one head is left, every
    token is its own, with :math:`p = 1`: that is :func:`attnx.softmax_attention` with this ``head_mask``.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        scale: factor on query . key, 1/sqrt(head_dim) by default.
        is_causal: hide later keys; aligned bottom-right, so that the last query sees the last key.
        decay: of ``usage``, from 0 to 1.
        {projection_arguments}

    Shapes:
        x: (batch, length, embed_dim).
        context: (batch, context_length, context_dim); x where not given.
        output: (batch, length, embed_dim).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Source: "SHRP: Specialized Head Routing and Pruning", arXiv 2512.20635. This follows its abstract; what that leaves
    open is a choice of ours.
    """

    keeps_dtype = ("usage", "head_mask")
    instead_of_masks = "attnx.nn.SigmoidAttention or attnx.softmax_attention"

    usage: Tensor
    head_mask: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        decay: float = 0.99,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__(embed_dim, num_heads, **projection)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected from 0 to 1, got {decay!r}")
        device, dtype = projection.get("device"), projection.get("dtype")
        self.scale = scale
        self.is_causal = is_causal
        self.decay = decay
        self.router = nn.Linear(embed_dim, num_heads, bias=False, device=device, dtype=dtype)
        for name in ("usage", "head_mask"):
            self.register_buffer(name, torch.empty(num_heads, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives ``usage`` and ``head_mask`` their start; the submodules have a reset_parameters of their own."""
        nn.init.constant_(self.usage, 1 / self.num_heads)
        nn.init.ones_(self.head_mask)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        query, key, value = self.project(x, context)
        self.hides(query, key, attn_mask, key_padding_mask)
        weights, heads = self.route(x)
        if self.training and torch.is_grad_enabled():
            counts = nn.functional.one_hot(heads, self.num_heads).sum((0, 1))
            target = counts / max(heads.numel(), 1)
            weights = torch.ops.attnx.move_average_in_backward(weights, self.usage, target, self.decay)
        routes = _routes(heads, self.num_heads, key.shape[2])
        output = routing_attention(query, key, value, routes, is_causal=self.causal(is_causal), scale=self.scale)
        return self.merge((output * weights[:, None, :, None]).to(output.dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight p of each token's head, in float32 at least, and the head, int64, each (batch, length)."""
        logits = self.router(x)
        logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        weights = logits.masked_fill(self.head_mask == 0, -torch.inf).softmax(-1)
        # max takes any of equal weights, argsort the first.
        heads = weights.detach().argsort(dim=-1, descending=True, stable=True)[..., 0]
        return weights.gather(-1, heads[..., None])[..., 0], heads

    @torch.no_grad()
    def prune_(self, keep: int) -> None:
        """Cuts all but the ``keep`` heads that are used most; of equals the lower heads stay, and of those cut none
        comes back.
        """
        left = int(self.head_mask.sum())
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= left:
            raise ValueError(f"keep: expected from 1 to the {left} heads that are left, got {keep!r}")
        order = self.usage.masked_fill(self.head_mask == 0, -1.0).argsort(descending=True, stable=True)
        self.head_mask.zero_()[order[:keep]] = 1.0

    @torch.no_grad()
    def compact(self) -> Self:
        """A module of the heads that are left, with copies of their parameters; it gives the same.

        Raises:
            ValueError: heads share keys.
        """
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads: expected num_heads = {self.num_heads}, as heads that share keys are not cut apart, got "
                f"{self.num_kv_heads}"
            )
        heads = self.head_mask.nonzero()[:, 0]
        features = (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()
        weight = self.q_proj.weight
        module = type(self)(
            self.embed_dim,
            len(heads),
            scale=self.scale,
            is_causal=self.is_causal,
            decay=self.decay,
            head_dim=self.head_dim,
            context_dim=self.context_dim,
            linear_bias=self.q_proj.bias is not None,
            rotary=self.rotary,
            device=weight.device,
            dtype=weight.dtype,
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            _copy(module.get_submodule(name), self.get_submodule(name), 0, features)
        _copy(module.out_proj, self.out_proj, 1, features)
        _copy(module.router, self.router, 0, heads)
        for name in ("q_norm", "k_norm", "output_norm"):
            setattr(module, name, copy.deepcopy(getattr(self, name)))
        module.usage.copy_(self.usage[heads])
        return module.train(self.training)

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "scale": self.scale,
            "is_causal": self.is_causal or None,
            "decay": self.decay,
        }


def _copy(own: nn.Module, whole: nn.Module, dim: int, index: Tensor) -> None:
    """Copies the rows, or columns, of a linear map; a bias belongs to the rows."""
    for name, x in own.named_parameters():
        source = whole.get_parameter(name)
        x.copy_(source if name == "bias" and dim == 1 else source.index_select(dim, index))


def _routes(heads: Tensor, num_heads: int, length_k: int) -> Routes:
    """Each head is one cluster, of the tokens that were sent to it and of all keys."""
    batch, length = heads.shape
    index = torch.arange(length, device=heads.device)
    tokens = heads.argsort(dim=1, stable=True)
    counts = (heads[:, None] == torch.arange(num_heads, device=heads.device)[:, None]).sum(-1)
    of_tokens = heads.gather(1, tokens)
    place = index - (counts.cumsum(1) - counts).gather(1, of_tokens)  # within the list of its head
    lists = torch.zeros(batch, num_heads * length, dtype=torch.int32, device=heads.device)
    lists.scatter_(1, of_tokens * length + place, tokens.to(torch.int32))
    keys = torch.arange(length_k, dtype=torch.int32, device=heads.device)
    ends = length_k * torch.arange(2, dtype=torch.int32, device=heads.device)
    return Routes(
        lists.unflatten(1, (num_heads, length)),
        torch.nn.functional.pad(counts[..., None], (1, 0)).to(torch.int32),
        keys.expand(batch, num_heads, -1).contiguous(),
        ends.expand(batch, num_heads, -1).contiguous(),
        length,
        length_k,
    )
