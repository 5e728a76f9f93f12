"""These processors give the self-attentions of diffusers' transformers an attention of attnx."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux, transformer_wan
from torch import Tensor, nn

__all__ = ["PROCESSORS", "HunyuanVideoProcessor", "Processor", "WanProcessor"]


class Processor(nn.Module):
    """This is what the processors share. Each is a submodule of its attention, and so are its parameters.

    Tokens are (batch, length, features) here, and heads (batch, heads, length, head_dim).

    Args:
        name: of the attention, in messages.
        attention: takes heads of query, key and value, and gives those of the output.
    """

    _parallel_config: Any = None  # diffusers sets it under context parallelism

    def __init__(self, name: str, attention: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.attention = attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any) -> Tensor:
        """Returns the tokens that come of heads."""
        asked = {"attention_mask": attention_mask, "context parallelism": self._parallel_config}
        if refused := [name for name, x in asked.items() if x is not None]:
            raise NotImplementedError(
                f"{self.name}: has no {', '.join(refused)}, which the model asks of its self-attention"
            )
        return self.attention(query, key, value, **given).transpose(1, 2).flatten(2)


def _heads(attn: Any, *tokens: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in tokens]


def _out(attn: Any, tokens: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(tokens))


class WanProcessor(Processor):
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


class FluxProcessor(Processor):
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


class JointProcessor(Processor):
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


class HunyuanVideoProcessor(Processor):
    """HunyuanVideo puts the tokens of a text behind those of a video, and padding behind the text.

    The attention is told how many tokens the text has, and how many of all are in use.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """diffusers looks at this signature for what a processor takes."""
        result: tuple[Tensor, Tensor] = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return result

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        joint = attn.add_q_proj is None  # one projection then serves both
        tokens = torch.cat((hidden_states, encoder_hidden_states), 1) if joint else hidden_states
        own = (projection(tokens) for projection in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = _normalised(_heads(attn, *own), attn.norm_q, attn.norm_k)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat((apply_rotary_emb(x[:, :, :video], image_rotary_emb), x[:, :, video:]), 2)
                for x in (query, key)
            )
        if not joint:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            added = _heads(attn, *(projection(encoder_hidden_states) for projection in projections))
            added = _normalised(added, attn.norm_added_q, attn.norm_added_k)
            query, key, value = (torch.cat(both, 2) for both in zip((query, key, value), added, strict=True))
        used = None if attention_mask is None else attention_mask.flatten(1).sum(-1, dtype=torch.int32)
        output = self.attend(query, key, value, None, text_length=text, seqused_k=used)
        of_video, of_text = output[:, :video], output[:, video:]
        # The model's own processor projects no output of attention that has no projections.
        if attn.to_out is not None:
            of_video = _out(attn, of_video)
        return of_video, of_text if attn.to_add_out is None else attn.to_add_out(of_text)


PROCESSORS: dict[type, type[Processor]] = {
    transformer_wan.WanAttnProcessor: WanProcessor,
    transformer_flux.FluxAttnProcessor: FluxProcessor,
    JointAttnProcessor2_0: JointProcessor,
    AttnProcessor2_0: JointProcessor,
}
