"""The rows of this sigmoid attention count the keys that a mask shows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx.functional import sigmoid_attention


def row_sigmoid_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any
) -> Tensor:
    """Calls :func:`attnx.sigmoid_attention` under the bias ``"row"``, which by itself counts the keys of the band.

    Padding, which a mask hides, then changes nothing for the other tokens.
    """
    if attn_mask is None:
        return sigmoid_attention(query, key, value, bias="row", **options)
    is_bool = attn_mask.dtype == torch.bool
    shown = attn_mask if is_bool else attn_mask > torch.finfo(attn_mask.dtype).min
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    bias = -shown.sum(-1, keepdim=True, dtype=sum_dtype).clamp(min=1).log()
    attn_mask = bias.where(attn_mask, -torch.inf) if is_bool else attn_mask + bias
    return sigmoid_attention(query, key, value, bias=0.0, attn_mask=attn_mask, **options)
