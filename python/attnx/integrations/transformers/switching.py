"""A model of transformers gets attentions with parameters or options here."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attnx.integrations.transformers.attention import IMPLEMENTATIONS, register
from attnx.integrations.transformers.scores import (
    BlockSparseScore,
    ProbabilisticScore,
    RoutingScore,
    SparseLinearScore,
)

__all__ = ["switch"]

_SHARED = {"attnx_probabilistic": ProbabilisticScore, "attnx_block_sparse": BlockSparseScore}


def switch(model: PreTrainedModel, implementation: str, **options: Any) -> None:
    """Switches a model to an attention of attnx, and gives its attention modules what that attention needs.

    Parameters and buffers are in a submodule ``attnx`` of each attention module: they train, move and are saved with
    the model. A saved model gets them back when it is loaded, switched with the same options, and given its state dict
    again, as ``from_pretrained`` does not know them.

    Args:
        model: one whose attention goes through transformers' ``AttentionInterface``.
        implementation: one of those that :func:`register` lists.
        options: of ``attnx_sparse_linear``: critical, negligible, block_size, feature_map, linear_scope, smooth_k,
            protect and rounding, as in :func:`attnx.sparse_linear_attention`; a projection of each module's O^l is
            trained and starts at 0, as in :class:`attnx.nn.SparseLinearAttention`. Of ``attnx_routing``: num_clusters,
            and routing ("argmax" by default), cluster_size, normalize_qk, score and bias as in
            :func:`attnx.routing_attention`, and decay; each module has centroids. Of ``attnx_probabilistic``: keep,
            density, mode, importance, score, bias and block_size as in :func:`attnx.probabilistic_attention`. Of
            ``attnx_block_sparse``: block_mask, an :class:`attnx.BlockMask` or a function of length_q, length_k and
            device that makes one, and score and bias as in :func:`attnx.block_sparse_attention`.

    ``attnx_sparse_linear`` and ``attnx_routing`` take causal and full attention, padding on either side and packed
    sequences, each of which they attend to on its own. They have no windows, sinks, softcaps, position biases and
    dropout, and a model that asks for one of these is refused at its first call. They read what a mask holds, at which
    ``torch.compile`` breaks its graph.

    Raises:
        ValueError: the model has no attention of the interface, or the implementation is none of attnx's.
        TypeError: an option is not one of the implementation's.
        RuntimeError: an option has another value than expected; the message names it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    attentions = {name: module for name, module in model.named_modules() if _is_attention(module)}
    if not attentions:
        raise ValueError(f"model: expected one with transformers' AttentionInterface, got {type(model).__name__}")
    if options and implementation in ("attnx_softmax", "attnx_sigmoid"):
        raise TypeError(f"{implementation}: expected no options, got {', '.join(options)}")
    shared = _SHARED[implementation](**options) if implementation in _SHARED else None
    made = {name: shared or _make(name, module, implementation, options) for name, module in attentions.items()}
    register()
    model.set_attn_implementation(implementation)
    for name, module in attentions.items():
        module.attnx = made[name]
        module.attnx_is_cross = bool(re.search(r"cross|encoder_attn|EncDec", name)) or bool(
            getattr(module, "is_cross_attention", False)
        )


def _is_attention(module: nn.Module) -> bool:
    """Tells whether its forward looks for an implementation."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _make(name: str, module: nn.Module, implementation: str, options: dict[str, Any]) -> nn.Module | None:
    """Makes a score of the module's sizes, on its device."""
    weight = next(module.parameters())
    if implementation == "attnx_sparse_linear":
        size = _size(name, module, "v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
        return SparseLinearScore(size, device=weight.device, dtype=weight.dtype, **options)
    if implementation == "attnx_routing":
        heads = _size(name, module, "num_heads", "num_attention_heads", "n_heads")
        size = _size(name, module, "qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
        return RoutingScore(heads, size, device=weight.device, **options)
    return None


def _size(name: str, module: nn.Module, *attributes: str) -> int:
    for owner in (module, getattr(module, "config", None)):
        for attribute in attributes:
            if isinstance(size := getattr(owner, attribute, None), int):
                return size
    raise ValueError(f"model: expected {' or '.join(attributes)} of {name}, a {type(module).__name__}, got none")
