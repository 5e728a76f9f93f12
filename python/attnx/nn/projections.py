"""What the attention modules share: projections, norms and rotary embeddings around an attention."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from attnx.nn import masks
from attnx.nn.arguments import ProjectionArguments, complete, shows_projection_arguments
from attnx.nn.buffers import KeepsDtype


@shows_projection_arguments
class ProjectedAttention(KeepsDtype):
    """Multi-head attention around :meth:`attend`, which is all that a subclass adds.

    Queries, keys and values stay in (batch, length, heads, head_dim) storage; the operators read them transposed,
    without a copy.

    The arguments of a call have the names and meanings of ``torch.nn.MultiheadAttention``: True in a boolean
    ``attn_mask`` or ``key_padding_mask`` hides, where True in the ``attn_mask`` of functions takes part.

    Args:
        embed_dim: features of a token.
        num_heads: query heads.
        {projection_arguments}

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
    """

    is_causal: bool
    instead_of_masks: ClassVar[str] = ""  # what to use where :meth:`attend` takes no masks; empty where it does

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        **projection: Unpack[ProjectionArguments],
    ) -> None:
        super().__init__()
        given = complete(self, projection)
        num_kv_heads, head_dim, rotary = given["num_kv_heads"], given["head_dim"], given["rotary"]
        self.embed_dim = positive("embed_dim", embed_dim)
        self.num_heads = positive("num_heads", num_heads)
        self.num_kv_heads = positive("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim} where head_dim is not given, got {num_heads}"
            )
        self.head_dim = positive("head_dim", embed_dim // num_heads if head_dim is None else head_dim)
        if rotary is not None and not callable(rotary):
            raise ValueError(f"rotary: expected a callable (query, key) -> (query, key), got {rotary!r}")
        self.rotary = rotary

        factory: dict[str, Any] = {"device": given["device"], "dtype": given["dtype"]}
        context_dim = given["context_dim"]
        self.context_dim = positive("context_dim", embed_dim if context_dim is None else context_dim)
        linear = functools.partial(nn.Linear, bias=given["linear_bias"], **factory)
        heads_dim, kv_heads_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = linear(embed_dim, heads_dim)
        self.k_proj = linear(self.context_dim, kv_heads_dim)
        self.v_proj = linear(self.context_dim, kv_heads_dim)
        self.out_proj = linear(heads_dim, embed_dim)

        def norm(wanted: bool, eps: float = 1e-5) -> nn.Module:
            return given["norm_layer"](self.head_dim, eps=eps, **factory) if wanted else nn.Identity()

        self.q_norm = norm(given["qk_norm"])
        self.k_norm = norm(given["qk_norm"])
        # A row's weights, and with them its output, may be small; a larger eps would swallow what they carry.
        self.output_norm = norm(given["output_norm"], eps=1e-8)

    @classmethod
    def from_softmax(cls, attention: nn.MultiheadAttention | ProjectedAttention, **options: Any) -> Self:
        """A module with the projections of a softmax attention, copied.

        It takes (batch, length, embed_dim), whatever ``batch_first`` says, and returns the output alone. Dropout of
        weights and a scale are not taken over. What this module computes of the heads is its own, so that the output
        is another unless its class says when it is the same.

        Args:
            attention: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``, whose keys and
                values have the same number of features; or a module of :mod:`attnx.nn`, whose norms and rotary are
                taken over, too.
            options: of the new module, such as ``is_causal``.

        Raises:
            ValueError: the attention has what this module does not.
        """
        if isinstance(attention, ProjectedAttention):
            module = cls._from_projected(attention, options)
        else:
            module = cls._from_multihead(attention, options)
        return module.train(attention.training)

    @classmethod
    def _from_multihead(cls, attention: nn.MultiheadAttention, options: dict[str, Any]) -> Self:
        weights, biases = multihead_projections(attention)
        if attention.kdim != attention.vdim:
            raise ValueError(
                f"attention: expected kdim equal to vdim, as keys and values are made of one context, got {attention}"
            )
        sizes = {
            "context_dim": attention.kdim,
            "linear_bias": biases is not None,
            "device": weights[0].device,
            "dtype": weights[0].dtype,
        }
        module = cls(attention.embed_dim, attention.num_heads, **(sizes | options))
        with torch.no_grad():
            for i, projection in enumerate((module.q_proj, module.k_proj, module.v_proj)):
                projection.weight.copy_(weights[i])
                if biases is not None:
                    projection.bias.copy_(biases[i])
        module.out_proj.load_state_dict(attention.out_proj.state_dict())
        return module

    @classmethod
    def _from_projected(cls, attention: ProjectedAttention, options: dict[str, Any]) -> Self:
        weight = attention.q_proj.weight
        sizes = {
            "num_kv_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "context_dim": attention.context_dim,
            "linear_bias": attention.q_proj.bias is not None,
            "rotary": attention.rotary,
            "device": weight.device,
            "dtype": weight.dtype,
        }
        module = cls(attention.embed_dim, attention.num_heads, **(sizes | options))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(module, name).load_state_dict(getattr(attention, name).state_dict())
        for name in ("q_norm", "k_norm", "output_norm"):
            setattr(module, name, copy.deepcopy(getattr(attention, name)))
        return module

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **hides: Any) -> Tensor:
        """(batch, heads, length, head_dim) each, with num_kv_heads heads of key and value.

        ``hides`` are the attn_mask and key_mask of :func:`attnx.softmax_attention`, for modules that take masks.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What :meth:`extra_repr` shows besides the sizes, where it is not None."""
        return {"num_kv_heads": None if self.num_kv_heads == self.num_heads else self.num_kv_heads}

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attends from the tokens of ``x`` to those of ``context``.

        Args:
            x: (batch, length, embed_dim).
            context: (batch, context_length, context_dim); x where not given.
            attn_mask: (length, context_length), (batch * num_heads, length, context_length), or
                (batch or 1, num_heads or 1, length, context_length). bool, where True hides the key from the query,
                unlike the ``attn_mask`` of functions; or floating point, which is added to the logits.
            key_padding_mask: (batch, context_length). bool, where True hides the key; or floating point, likewise.
            is_causal: hide later keys, aligned bottom-right; as if the module was made with it. It needs no
                ``attn_mask`` beside it, and hides besides what that hides.

        Returns:
            (batch, length, embed_dim).

        Raises:
            ValueError: an argument does not fit, or the attention has no such mask; the message names it, what was
                expected and what came.
        """
        query, key, value = self.project(x, context)
        hides = self.hides(query, key, attn_mask, key_padding_mask)
        return self.merge(self.attend(query, key, value, self.causal(is_causal), **hides))

    def hides(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> dict[str, Any]:
        """The masks of a call as :meth:`attend` takes them."""
        if self.instead_of_masks:
            masks.refuse(type(self).__name__, self.instead_of_masks, attn_mask=attn_mask)
            masks.refuse(type(self).__name__, self.instead_of_masks, key_padding_mask=key_padding_mask)
            return {}
        if attn_mask is None and key_padding_mask is None:
            return {}
        return masks.of_call(query, key, attn_mask, key_padding_mask)

    def causal(self, is_causal: bool) -> bool:
        if not isinstance(is_causal, bool):
            raise ValueError(f"is_causal: expected True or False, got {is_causal!r}")
        return self.is_causal or is_causal

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The query, key and value that :meth:`attend` takes."""
        context = x if context is None else context
        for name, tokens, features in (("x", x, self.embed_dim), ("context", context, self.context_dim)):
            if tokens.dim() != 3 or tokens.shape[2] != features:
                raise ValueError(
                    f"{name}: expected (batch, length, {features}), got a tensor of shape {tuple(tokens.shape)}"
                )
        # The projections say how many heads there are: under tensor parallelism each process has a share of them.
        query = self.q_norm(self.q_proj(x).unflatten(2, (-1, self.head_dim))).transpose(1, 2)
        key = self.k_norm(self.k_proj(context).unflatten(2, (-1, self.head_dim))).transpose(1, 2)
        value = self.v_proj(context).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        if self.rotary is not None:
            query, key = self.rotary(query, key)
        return query, key, value

    def merge(self, output: Tensor) -> Tensor:
        """The heads' outputs, (batch, heads, length, head_dim), as (batch, length, embed_dim)."""
        return self.out_proj(self.output_norm(output.transpose(1, 2)).flatten(2))

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        return "".join([sizes, *(f", {name}={x!r}" for name, x in self.options().items() if x is not None)])


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return value


def multihead_projections(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor] | None]:
    """The weights and biases of its query, key and value projection, which it may hold packed.

    Raises:
        ValueError: it is none, or has ``add_bias_kv`` or ``add_zero_attn``.
    """
    if not isinstance(attention, nn.MultiheadAttention):
        raise ValueError(
            f"attention: expected torch.nn.MultiheadAttention or a module of attnx.nn, got {type(attention)}"
        )
    if attention.bias_k is not None:
        raise ValueError(f"attention: expected add_bias_kv=False, got add_bias_kv=True in {attention}")
    if attention.add_zero_attn:
        raise ValueError(f"attention: expected add_zero_attn=False, got add_zero_attn=True in {attention}")
    if attention.in_proj_weight is not None:
        weights = list(attention.in_proj_weight.chunk(3))
    else:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    bias = attention.in_proj_bias
    return weights, None if bias is None else list(bias.chunk(3))
