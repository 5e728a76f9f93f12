"""The dense attentions of attnx become attention backends of diffusers here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from attnx.functional import softmax_attention
from attnx.integrations.row_sigmoid import row_sigmoid_attention

__all__ = ["register"]


def register() -> None:
    """Adds ``attnx_softmax`` and ``attnx_sigmoid`` to diffusers' attention backends, for all models of this process.

    ``model.set_attention_backend("attnx_softmax")`` then switches a model whose processors go through diffusers'
    dispatch, such as Wan's and Flux's. The processors of SD3 and PixArt call PyTorch themselves, and diffusers switches
    none of them. ``attnx_sigmoid`` weighs each key by the sigmoid of its logit, less the logarithm of the number of
    keys that the row sees: a model has to be trained with it.
    """
    for name in ("attnx_softmax", "attnx_sigmoid"):
        if name not in AttentionBackendName._value2member_map_:
            _AttentionBackendRegistry.register(_new_member(name))(functools.partial(_attend, name))


def _new_member(name: str) -> AttentionBackendName:
    """Adds a member to diffusers' enumeration, which lists every backend that a model may be set to."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._member_map_[name.upper()] = member
    AttentionBackendName._value2member_map_[name] = member
    AttentionBackendName._member_names_.append(name.upper())
    return member


def _attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Query, key and value are (batch, length, heads, head_dim), and so is the output."""
    if return_lse or _parallel_config is not None:
        asked = "return_lse" if return_lse else "context parallelism"
        raise NotImplementedError(f"{name}: has no {asked}; use another backend for it")
    if is_causal and query.shape[1] != key.shape[1]:
        raise NotImplementedError(
            f"{name}: expected as many queries as keys with is_causal, which PyTorch aligns top-left and attnx "
            f"bottom-right, got {query.shape[1]} and {key.shape[1]}"
        )
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # diffusers takes it for one of keys
    attend: Callable[..., Tensor] = softmax_attention if name == "attnx_softmax" else row_sigmoid_attention
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = attend(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
    )
    return output.transpose(1, 2)
