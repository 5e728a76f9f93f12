"""Video transformers of diffusers get rectified sparse attention here, with the weights that they have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from attnx.integrations.diffusers.processors import HunyuanVideoProcessor, Processor, WanProcessor
from attnx.rectified import rectified_attention

__all__ = ["apply_rectified"]

_PROCESSORS: dict[type, type[Processor]] = {
    WanAttnProcessor: WanProcessor,
    HunyuanVideoAttnProcessor2_0: HunyuanVideoProcessor,
}


class _Rectified(nn.Module):
    """Rectified sparse attention has no parameters. Its options are those of all calls."""

    neighbours: Tensor | None

    def __init__(self, top_p: float, drop: float, neighbours: Tensor | None) -> None:
        super().__init__()
        self.top_p, self.drop = top_p, drop
        self.register_buffer("neighbours", neighbours, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        options: dict[str, Any] = {"top_p": self.top_p, "drop": self.drop, "neighbours": self.neighbours}
        return rectified_attention(query, key, value, **options, **given)

    def extra_repr(self) -> str:
        return f"top_p={self.top_p}, drop={self.drop}"


def apply_rectified(
    model: ModelMixin, *, top_p: float = 0.3, drop: float = 0.8, neighbours: Tensor | None = None
) -> None:
    """Gives the self-attentions over a video's tokens rectified sparse attention, without training.

    Attention to a text of its own, and that of a text refiner, stays as it is. HunyuanVideo's masks of padding are
    taken as they come. Blocks are of the tokens in the model's own order, frame by frame and row by row.

    Args:
        model: a transformer of diffusers with the processors of HunyuanVideo or Wan.
        top_p, drop, neighbours: as in :func:`attnx.rectified_attention`; ``drop=0`` leaves the model as it was.

    Raises:
        ValueError: the model has no such attention.
        RuntimeError: an option does not fit; the message names it, what was expected and what came.

    Source: "Rectified SpaAttn", arXiv 2511.19835.
    """
    one = torch.zeros(1, 1, 1, 1)
    rectified_attention(one, one, one, top_p=top_p, drop=drop)  # options are checked ahead of any change
    found: list[Any] = [
        module
        for module in model.modules()
        if type(getattr(module, "processor", None)) in _PROCESSORS and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise ValueError(
            f"model: expected a transformer with processors of {', '.join(x.__name__ for x in _PROCESSORS)}, got "
            f"{type(model).__name__}"
        )
    for attention in found:
        made = _PROCESSORS[type(attention.processor)]("rectified attention", _Rectified(top_p, drop, neighbours))
        attention.set_processor(made)
