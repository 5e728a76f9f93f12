"""attnx's attentions as transformers' attention implementations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from attnx.functional import sigmoid_attention, softmax_attention
from attnx.integrations.transformers.cache import StaircaseLayer

__all__ = ["register"]


def register() -> None:
    """Adds attnx's attentions to transformers' implementations, for all models of this process.

    - ``attnx_softmax`` is what the model computes with ``sdpa`` or ``eager``, sinks, softcaps and position biases
      included. Keys may come from a :class:`StaircaseCache`, which does without these three.
    - ``attnx_sigmoid`` weighs each key by the sigmoid of its logit, less the logarithm of the number of keys that
      the row sees in the band. A model has to be trained with it.

    ``model.set_attn_implementation("attnx_softmax")`` then switches to one of them, as does
    ``attn_implementation="attnx_softmax"`` where a model is made.
    """
    for name in ("attnx_softmax", "attnx_sigmoid"):
        AttentionInterface.register(name, functools.partial(_attend, name))
        AttentionMaskInterface.register(name, sdpa_mask)


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    if output_attentions:
        raise NotImplementedError(f"{name}: no output_attentions, as no kernel keeps the weights; use eager for them")
    layer: StaircaseLayer | None = getattr(key, "attnx_layer", None)
    if layer is not None:
        asked = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, "dropout": dropout or None}
        if refused := [argument for argument, x in asked.items() if x is not None]:
            raise NotImplementedError(
                f"{name}: a StaircaseCache does without {', '.join(refused)}, which the model asks for"
            )
        if layer.holds_more_than(key):
            return layer.attend(query, key, value, attention_mask, scale=scaling).transpose(1, 2).contiguous(), None
        layer.append(key, value, attention_mask)
    key, value, options = _band(module, query, key, value, attention_mask, is_causal)
    options |= {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    options["attn_mask"] = _mask(attention_mask, position_bias, key)
    if name == "attnx_softmax":
        sink = None if s_aux is None else s_aux.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        output: Tensor = softmax_attention(query, key, value, sink=sink, **options)
    elif s_aux is None:
        output = sigmoid_attention(query, key, value, bias="row", **options)
    else:
        raise NotImplementedError(
            f"{name}: the model has sinks (s_aux), and sigmoid weights have no sum to put them in"
        )
    return output.transpose(1, 2).contiguous(), None


def _band(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The keys that count and whether they are masked causally, by the rules of transformers' sdpa.

    transformers leaves out the mask of one query, of as many queries as keys, and of a prompt whose keys are the first
    of a static cache.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    causal = bool(is_causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
    return key, value, {"is_causal": causal}


def _mask(attention_mask: Tensor | None, position_bias: Tensor | None, key: Tensor) -> Tensor | None:
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if position_bias is None:
        return attention_mask
    position_bias = position_bias[..., : key.shape[2]]
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -torch.inf)
    return position_bias + attention_mask
