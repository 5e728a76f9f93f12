"""Transformers of diffusers get sparse-linear attention here, to fine-tune."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from diffusers import ModelMixin
from torch import nn

from attnx.integrations.diffusers.processors import PROCESSORS, Processor
from attnx.integrations.sparse_linear import SparseLinear
from attnx.sparse_linear import FeatureMap, LinearScope, Rounding

__all__ = ["apply_sparse_linear", "load_sparse_linear"]

_Model = TypeVar("_Model", bound=ModelMixin)


def apply_sparse_linear(
    model: ModelMixin,
    *,
    critical: float = 0.05,
    negligible: float = 0.10,
    block_size: tuple[int, int] = (64, 64),
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    smooth_k: bool = False,
    protect: int = 0,
    rounding: Rounding = "ceil",
) -> None:
    """Gives the self-attentions of a model sparse-linear attention, to fine-tune from its weights.

    Each gets a processor with a projection of O^l that starts at 0, as in :class:`attnx.nn.SparseLinearAttention`: the
    model is attention over the critical blocks alone at first, and with ``critical=1, negligible=0`` what it was. The
    projections are parameters of the model, named ``...processor.attention.linear_proj``. ``save_pretrained`` saves
    them, and the options in the config; :func:`load_sparse_linear` reads both. Attention to a text of its own stays as
    it is; where text and image attend together, the text has blocks, too.

    Args:
        model: a transformer of diffusers with the processors of Wan, Flux, SD3 or PixArt.
        critical, negligible, block_size, feature_map, linear_scope, smooth_k, protect, rounding: as in
            :func:`attnx.sparse_linear_attention`.

    Raises:
        ValueError: a self-attention of the model has another processor, or the model has none.
        RuntimeError: an option does not fit; the message names it, what was expected and what came.

    Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arXiv 2509.24006.
    """
    options = {
        "critical": critical,
        "negligible": negligible,
        "block_size": block_size,
        "feature_map": feature_map,
        "linear_scope": linear_scope,
        "smooth_k": smooth_k,
        "protect": protect,
        "rounding": rounding,
    }
    attentions = _self_attentions(model)
    made = [_make(attention, options) for attention in attentions.values()]
    for attention, processor in zip(attentions.values(), made, strict=True):
        attention.set_processor(processor)
    model.register_to_config(attnx_sparse_linear=options)


def _self_attentions(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)
    }
    if not found:
        raise ValueError(f"model: expected a transformer of diffusers with self-attention, got {type(model).__name__}")
    for name, module in found.items():
        if type(module.processor) not in PROCESSORS:
            raise ValueError(
                f"model: expected processors of {', '.join(original.__name__ for original in PROCESSORS)}, got "
                f"{type(module.processor).__name__} of {name}"
            )
        # Attentions of U-Nets have more around them than PixArt's, whose class they share.
        around = {"spatial_norm": None, "group_norm": None, "residual_connection": False, "rescale_output_factor": 1.0}
        if others := [name for name, x in around.items() if getattr(module, name, x) != x]:
            raise ValueError(f"model: expected attention without {', '.join(others)}, got {name} with it")
    return found


def _make(attention: Any, options: dict[str, Any]) -> Processor:
    weight = attention.to_q.weight
    head_dim = attention.inner_dim // attention.heads
    made = SparseLinear(head_dim, device=weight.device, dtype=weight.dtype, **options)
    return PROCESSORS[type(attention.processor)]("sparse-linear attention", made)


def load_sparse_linear(model_class: type[_Model], path: str, **options: Any) -> _Model:
    """Loads a model that :func:`apply_sparse_linear` changed and ``save_pretrained`` saved, with its projections.

    ``model_class.from_pretrained`` would leave the projections out and load the dense model.

    Args:
        model_class: of the model, such as ``diffusers.WanTransformer3DModel``.
        path: where it was saved, as ``from_pretrained`` takes it.
        options: of ``from_pretrained``, such as ``torch_dtype``.

    Raises:
        ValueError: the model there was saved without sparse-linear attention.
    """

    def init(self: _Model, *args: Any, attnx_sparse_linear: dict[str, Any] | None = None, **sizes: Any) -> None:
        if attnx_sparse_linear is None:
            raise ValueError(f"path: expected a model with sparse-linear attention, got {path} without")
        model_class.__init__(self, *args, **sizes)
        apply_sparse_linear(self, **attnx_sparse_linear)

    # diffusers looks there for what to pass of the config.
    own = inspect.signature(init).parameters["attnx_sparse_linear"]
    signature = inspect.signature(model_class.__init__)
    init.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]

    # diffusers makes the model, and then looks for the parameters that it has.
    applied: Any = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    model: _Model = applied.from_pretrained(path, **options)
    model.__class__ = model_class
    return model
