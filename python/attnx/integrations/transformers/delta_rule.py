"""The gated delta rule in transformers, whose layers call it as a function of their Python module."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnx.delta_rule import gated_delta_rule

__all__ = ["use_gated_delta_rule"]

_NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def use_gated_delta_rule(model: nn.Module) -> int:
    """Has the layers of a model run :func:`attnx.gated_delta_rule` on the CPU, such as those of Qwen3-Next and Qwen3.5.

    The layers call ``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule`` of the Python module that
    defines them, and these are replaced there, so that other models of the same architecture in the process have it,
    too. Tensors elsewhere than on the CPU and packed sequences (``cu_seqlens``) go on to what was there before. Queries
    and keys are normalised in float32, as before, and in float64 for float64, which was float32 before.

    Args:
        model: any model of transformers' with such layers.

    Returns:
        How many layers have it.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [x for x in model.modules() if "gated_delta_rule" in _names_of(type(x).forward)]
    if not layers:
        raise ValueError(f"model: expected one with layers of the gated delta rule, got {type(model).__name__} without")
    for module in {sys.modules[type(x).__module__] for x in layers}:
        for name in _NAMES:
            function = getattr(module, name)
            if not hasattr(function, "in_place_of"):
                setattr(module, name, _replacement(function))
    return len(layers)


def _names_of(function: Any) -> str:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return " ".join(name for name in names if name in _NAMES)


def _replacement(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows are (batch, length, heads, head_dim)."""
        if query.device.type != "cpu" or others.get("cu_seqlens") is not None:
            options = {"initial_state": initial_state, "output_final_state": output_final_state} | others
            normalises = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
            result: tuple[Tensor, Tensor | None] = function(query, key, value, g, beta, **options, **normalises)
            return result
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        # Behind the convolution rows lie feature by feature.
        rows = [x.contiguous().transpose(1, 2) for x in (query, key, value)]
        gates = [x.transpose(1, 2).to(sums) for x in (g, beta)]
        before = None if initial_state is None else initial_state.to(sums)
        output, state = gated_delta_rule(
            *rows, *gates, initial_state=before, normalize_qk=use_qk_l2norm_in_kernel, return_state=True
        )
        return output.transpose(1, 2), state if output_final_state else None

    rule.in_place_of = function  # type: ignore[attr-defined]
    return rule
