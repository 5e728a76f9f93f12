"""These processors give the self-attentions of diffusers' transformers sparse-linear attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux, transformer_wan
from torch import Tensor, nn

from attnx.integrations.sparse_linear import SparseLinear

__all__ = ["PROCESSORS", "SparseLinearProcessor"]


class SparseLinearProcessor(nn.Module):
    """This is what the processors share. Each is a submodule of its attention, and so are its parameters.

    Tokens are (batch, length, features) here, and heads (batch, heads, length, head_dim).
    """

    _parallel_config: Any = None  # diffusers sets it under context parallelism

    def __init__(self, head_dim: int, **options: Any) -> None:
        super().__init__()
        self.attention = SparseLinear(head_dim, **options)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the tokens that come of heads."""
        asked = {"attention_mask": attention_mask, "context parallelism": self._parallel_config}
        if refused := [name for name, x in asked.items() if x is not None]:
            raise NotImplementedError(
                f"sparse-linear attention: has no {', '.join(refused)}, which the model asks of its self-attention"
            )
        return self.attention(query, key, value).transpose(1, 2).flatten(2)


def _heads(attn: Any, *tokens: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in tokens]


def _out(attn: Any, tokens: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(tokens))


class WanProcessor(SparseLinearProcessor):
    """Wan's tokens are those of a video alone."""

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value = transformer_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = _heads(attn, attn.norm_q(query), attn.norm_k(key), value)
        if rotary_emb is not None:
            query, key = (_rotate_pairs(x, *rotary_emb) for x in (query, key))
        return _out(attn, self.attend(query, key, value, attention_mask))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring features of (batch, heads, length, head_dim) by (1, length, 1, head_dim) angles."""
    cos, sin = (angle.transpose(1, 2)[..., ::2] for angle in (cos, sin))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class FluxProcessor(SparseLinearProcessor):
    """Flux puts the tokens of an image behind those of a text."""

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        *own, text_query, text_key, text_value = transformer_flux._get_qkv_projections(
            attn, hidden_states, encoder_hidden_states
        )
        query, key, value = _heads(attn, *own)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = _heads(attn, text_query, text_key, text_value)
            text = [attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]]
            query, key, value = (torch.cat(both, 2) for both in zip(text, (query, key, value), strict=True))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        output = self.attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        return _out(attn, output[:, length:]), attn.to_add_out(output[:, :length])


class JointProcessor(SparseLinearProcessor):
    """SD3 puts the tokens of an image before those of a text, and PixArt has no text here."""

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image = (projection(hidden_states) for projection in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = _normalised(_heads(attn, *image), attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text = _heads(attn, *(projection(encoder_hidden_states) for projection in projections))
            text = _normalised(text, attn.norm_added_q, attn.norm_added_k)
            query, key, value = (torch.cat(both, 2) for both in zip((query, key, value), text, strict=True))
        output = self.attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return _out(attn, output)
        length = hidden_states.shape[1]
        of_text = output[:, length:]
        return _out(attn, output[:, :length]), of_text if attn.context_pre_only else attn.to_add_out(of_text)


def _normalised(heads: list[Tensor], norm_q: nn.Module | None, norm_k: nn.Module | None) -> list[Tensor]:
    query, key, value = heads
    return [query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value]


PROCESSORS: dict[type, type[SparseLinearProcessor]] = {
    transformer_wan.WanAttnProcessor: WanProcessor,
    transformer_flux.FluxAttnProcessor: FluxProcessor,
    JointAttnProcessor2_0: JointProcessor,
    AttnProcessor2_0: JointProcessor,
}
