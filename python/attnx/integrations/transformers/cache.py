"""A staircase KV cache for transformers' models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

import attnx

__all__ = ["StaircaseCache", "StaircaseLayer"]


class StaircaseCache(Cache):
    """The cache of a model whose layers each keep an :class:`attnx.StaircaseCache`; ``generate`` takes it as ``cache``.

    A prompt attends in full and is quantised behind it; what follows attends to the quantised tokens. Sequences of a
    batch may be padded on either side, and hold no padding. Layers with a sliding window keep transformers' own.

    Args:
        config: the model's, whose attention implementation must be ``attnx_softmax``.
        max_length: most tokens of a sequence, prompt included.
        levels, group, residual: as of :class:`attnx.StaircaseCache`.
        window: as of :class:`attnx.StaircaseCache`; by default about a sixteenth of ``max_length``, in multiples of
            ``group`` and at most 128, so that most tokens of a short cache fall, too.

    Raises:
        ValueError: the model has layers of another kind, or another attention implementation than ``attnx_softmax``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        max_length: int,
        *,
        levels: Sequence[int] = (16, 8, 4, 2),
        window: int | None = None,
        group: int = 32,
        residual: int = 0,
    ) -> None:
        config = config.get_text_config(decoder=True)
        if window is None:
            window = min(max(max_length // 16 // group, 1) * group, max(128 // group, 1) * group)
        options = {"levels": tuple(levels), "window": window, "group": group, "residual": residual}
        layers: list[CacheLayerMixin] = []
        for kind, arguments in zip(*get_layer_types_and_kwargs(config), strict=True):
            if kind == "full_attention":
                layers.append(StaircaseLayer(config, max_length, options))
            elif kind == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(**arguments))
            else:
                raise ValueError(f"config: expected layers of full_attention or sliding_attention, got {kind}")
        super().__init__(layers=layers)


class _Places(NamedTuple):
    """Where the tokens of a padded batch stood that are no padding, and how many there are of each sequence."""

    order: Tensor  # (batch, tokens): those that are no padding first
    counts: Tensor  # (batch,)

    @classmethod
    def of(cls, attention_mask: Tensor, key: Tensor) -> _Places:
        """The last query sees every key that is no padding."""
        seen = attention_mask[:, 0, -1, -key.shape[2] :]
        seen = (seen if seen.dtype == torch.bool else seen == 0).expand(key.shape[0], -1)
        return cls(seen.sort(dim=1, descending=True, stable=True).indices, seen.sum(1))

    def first(self, x: Tensor) -> Tensor:
        return x.gather(2, self.order[:, None, :, None].expand_as(x))

    def back(self, x: Tensor) -> Tensor:
        return x.gather(2, self.order.argsort(1)[:, None, :, None].expand_as(x))


class StaircaseLayer(CacheLayerMixin):
    """One layer: what the model appends waits for the attention, which knows the padding and reads the cache."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: PretrainedConfig, max_length: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.max_length = max_length
        self.options = options
        self.cache: attnx.StaircaseCache | None = None
        self.length = 0  # positions, padding included

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[-1] != value_states.shape[-1]:
            raise ValueError(
                "config: expected keys and values of one head_dim for a StaircaseCache, got "
                f"{key_states.shape[-1]} and {value_states.shape[-1]}"
            )
        self.cache = attnx.StaircaseCache(
            key_states.shape[0],
            key_states.shape[1],
            key_states.shape[3],
            self.max_length,
            dtype=key_states.dtype,
            device=key_states.device,
            **self.options,
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        implementation = self.config._attn_implementation
        if implementation != "attnx_softmax":
            raise ValueError(
                f"attn_implementation: expected attnx_softmax with a StaircaseCache, got {implementation}; call "
                'model.set_attn_implementation("attnx_softmax")'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        key_states.attnx_layer = self
        return key_states, value_states

    def holds_more_than(self, key: Tensor) -> bool:
        """Whether there are tokens before the new ones."""
        return self.length > key.shape[2]

    def append(self, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> _Places | None:
        """Appends the new tokens that are no padding; says where these stood, if there is a mask."""
        assert self.cache is not None
        if attention_mask is None:
            self.cache.append(key.detach(), value.detach())
            return None
        places = _Places.of(attention_mask[..., : self.length], key)
        self.cache.append(places.first(key.detach()), places.first(value.detach()), counts=places.counts)
        return places

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """Appends the new tokens, and has their queries attend to all that the cache holds."""
        assert self.cache is not None
        places = self.append(key, value, attention_mask)
        if places is None or query.shape[2] == 1:
            return self.cache.attend(query, scale=scale)
        output = self.cache.attend(places.first(query), scale=scale, query_lengths=places.counts)
        return places.back(output)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0, or minus the number of tokens, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.cache is not None:
            self.cache.crop(tokens_to_remove)
            self.length += tokens_to_remove

    def reset(self) -> None:
        self.length = 0
        if self.cache is not None:
            self.cache.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx.to(self.cache.device, torch.int64))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            every = torch.arange(self.cache.batch_size, device=self.cache.device)
            self.cache.reorder(every[indices.to(self.cache.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.cache.expand(repeats)

    def offload(self) -> None:
        raise NotImplementedError("offloading: a StaircaseCache stays on its device; make the cache without offloading")

    prefetch = offload
