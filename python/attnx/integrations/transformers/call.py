"""A call holds what a model asks of an attention implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnx.integrations.transformers.packing import Packing


@dataclass
class Call:
    """Query, key and value are (batch, heads, length, head_dim)."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    position_bias: Tensor | None
    is_causal: bool
    is_cross: bool
    training: bool
    scale: float | None
    dropout: float
    softcap: float | None
    sink: Tensor | None
    window: int | None

    def options(self) -> dict[str, Any]:
        """Returns what every operator takes."""
        return {"scale": self.scale, "is_causal": self.is_causal}

    def terms(self) -> dict[str, Any]:
        """Returns what operators with terms take besides."""
        return {"softcap": self.softcap, "dropout_p": self.dropout, "attn_mask": self.mask()}

    def has_terms(self) -> bool:
        masks = self.attention_mask, self.position_bias
        return any(x is not None for x in (*masks, self.softcap, self.sink)) or self.dropout > 0

    def mask(self) -> Tensor | None:
        """Returns the mask of pairs, bool or added to logits, with the position bias."""
        keys = self.key.shape[2]
        mask = None if self.attention_mask is None else self.attention_mask[..., :keys]
        if self.position_bias is None or mask is None:
            return mask if self.position_bias is None else self.position_bias[..., :keys]
        bias = self.position_bias[..., :keys]
        return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask

    def is_causal_by_mask(self) -> bool:
        """Tells whether later keys are hidden, be it by the mask."""
        if self.attention_mask is None or self.attention_mask.dtype != torch.bool:
            return self.is_causal
        return _hides_later_keys(self.attention_mask, self.key.shape[2])

    def without_unused_keys(self) -> Call:
        """Leaves out the last keys of a static cache, which no query sees yet."""
        mask, queries, keys = self.attention_mask, self.query.shape[2], self.key.shape[2]
        if mask is None or mask.dtype != torch.bool or keys <= queries or self.is_cross:
            return self
        seen = mask[..., :keys].flatten(0, -2).any(0).nonzero()
        used = max(int(seen.max()) + 1 if len(seen) else 0, queries)
        return replace(self, key=self.key[:, :, :used], value=self.value[:, :, :used])

    def refuse(self, *names: str) -> None:
        """Raises if the model asks for one of these arguments of its attention."""
        asked: dict[str, Any] = {
            "dropout": self.dropout or None,
            "softcap": self.softcap,
            "s_aux": self.sink,
            "position_bias": self.position_bias,
            "sliding_window": self.window,
        }
        if refused := [name for name in names if asked[name] is not None]:
            hints = {"sliding_window": "set config.sliding_window = None", "dropout": "set it to 0 in the config"}
            hint = "".join(f"; {hints[name]}" for name in refused if name in hints)
            raise NotImplementedError(f"{self.name}: has no {', '.join(refused)}, which the model asks for{hint}")

    def packing(self) -> Packing | None:
        """Returns the sequences that the mask keeps apart, or None where there is no mask."""
        if self.attention_mask is None:
            return None
        packing = _packing(self.attention_mask, len(self.query), self.key.shape[2], self.is_cross)
        if packing is None:
            raise NotImplementedError(
                f"{self.name}: expected a mask that is causal, hides padding or keeps packed sequences apart, got "
                f"another, {self.attention_mask.dtype} of shape {tuple(self.attention_mask.shape)}, such as one with a "
                "window"
            )
        return packing


@torch.compiler.disable  # how large the parts are is known once the mask is
def _packing(mask: Tensor, batch: int, keys: int, is_cross: bool) -> Packing | None:
    """Returns None where the mask is something else. Layers share a mask, and what it says is worked out once."""
    known: dict[Any, Packing | None] = mask.__dict__.setdefault("attnx_packings", {})
    kind = keys, is_cross
    if kind not in known:
        one_for_all_heads = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
        seen = mask[:, 0, :, :keys].expand(batch, -1, -1) if one_for_all_heads else None
        known[kind] = None if seen is None else Packing.of(seen, is_cross)
    return known[kind]


@torch.compiler.disable
def _hides_later_keys(mask: Tensor, keys: int) -> bool:
    """Tells whether there are as many queries as keys, and none sees a later one, which is worked out once, too."""
    known: dict[int, bool] = mask.__dict__.setdefault("attnx_causal", {})
    if keys not in known:
        known[keys] = mask.shape[-2] == keys and not bool(mask[..., :keys].triu(1).any())
    return known[keys]
