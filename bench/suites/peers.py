"""Attention of other packages, as far as they are installed. Each takes (batch, length, heads, head_dim)."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from suite import Attention, Case, Contender, Inputs, Prepare
from suites.dense import SIGMOID, SOFTMAX


def _peer(module: str, name: str, options: Callable[[Case], dict[str, Any]]) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        function = getattr(importlib.import_module(module), name)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = function(*(x.transpose(1, 2) for x in (query, key, value)), **options(case))
            return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)  # some add the logsumexp

        return attention

    return prepare


def _causal(case: Case) -> dict[str, Any]:
    return {"causal": case.is_causal}


def _flash_sigmoid(case: Case) -> dict[str, Any]:
    return {"causal": case.is_causal, "sigmoid_bias": -math.log(case.length_k)}


_PEERS = {
    "flash_attn": Contender("flash-attn-2", SOFTMAX, _peer("flash_attn", "flash_attn_func", _causal)),
    "flash_attn_interface": Contender(
        "flash-attn-3", SOFTMAX, _peer("flash_attn_interface", "flash_attn_func", _causal)
    ),
    "flash_attn.cute": Contender(
        "flash-attn-4", SOFTMAX, _peer("flash_attn.cute.interface", "flash_attn_func", _causal)
    ),
    "flash_sigmoid": Contender(
        "flash-sigmoid", SIGMOID, _peer("flash_sigmoid.flash_attn_interface", "flash_attn_func", _flash_sigmoid)
    ),
    "triton_sigmoid": Contender(
        "triton-sigmoid", SIGMOID, _peer("triton_sigmoid", "sigmoid_attention", lambda c: {"is_causal": c.is_causal})
    ),
}


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package around it is missing, or broken
        return False


def installed() -> tuple[Contender, ...]:
    return tuple(contender for module, contender in _PEERS.items() if is_installed(module))
