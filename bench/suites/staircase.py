"""Decoding over a staircase cache beside the same decoding over keys and values in full, over the context length."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite
from suites import dense, peers


def _case(length: int, quick: bool = False, **options: Any) -> Case:
    sizes: dict[str, Any] = {"heads": 32, "kv_heads": 8, "length_q": 1, "head_dim": 128} | options
    name = "-".join([str(length), *(f"{k.replace('_', '')}{n}" for k, n in options.items())])
    return Case(name, length_k=length, directions=("forward",), quick=quick, **sizes)


CASES = (
    _case(2048, quick=True),
    _case(8192, quick=True),
    _case(32768),
    _case(65536),
    _case(8192, batch=4),
    _case(32768, heads=8),
    _case(32768, length_q=8),
    _case(8192, heads=8, head_dim=64),
)
GPU_CASES = tuple(_case(n, quick=n == 8192, batch=b) for n in (131072, 32768, 8192) for b in (1, 8))
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _cache(inputs: Inputs, **layout: Any) -> attnx.StaircaseCache:
    batch, heads, length, head_dim = inputs.key.shape
    options: dict[str, Any] = {"dtype": inputs.key.dtype, "device": inputs.key.device} | layout
    cache = attnx.StaircaseCache(batch, heads, head_dim, length, **options)
    cache.append(inputs.key, inputs.value)
    return cache


def _staircase(**layout: Any) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        cache = _cache(inputs, **layout)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = cache.attend(query, is_causal=False)
            assert isinstance(output, Tensor)
            return output

        return attention

    return prepare


def _formula(**layout: Any) -> Formula:
    def reference(case: Case, exact: Inputs) -> Attention:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attnx.reference.staircase_attention(query, key, value, is_causal=False, **layout)

        return attention

    def eager(case: Case, inputs: Inputs) -> Attention:
        plain = dense.SOFTMAX.eager(case, inputs)
        read = _cache(inputs, **layout).dequantize()
        return lambda query, key, value: plain(query, *read)

    return Formula(reference, eager)


def _math(case: Case, inputs: Inputs) -> Attention:
    """Two matrix products with the heads of a group as rows: each key read once, as scaled_dot_product_attention on
    the CPU does not."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
        weights = torch.softmax(rows @ key.mT * query.shape[-1] ** -0.5, -1)
        return (weights @ value).reshape(query.shape)

    return attention


def _fastest(case: Case, inputs: Inputs) -> Attention:
    """scaled_dot_product_attention by the backend that is fastest here, of those that take the case."""
    attention = dense.sdpa(case, inputs)

    def by(backend: SDPBackend) -> Attention:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(query, key, value)

        return call

    def seconds(call: Attention) -> float:
        synchronize = torch.cuda.synchronize if inputs.query.is_cuda else lambda: None
        samples = []
        with torch.no_grad():
            for _ in range(5):
                synchronize()
                start = time.perf_counter()
                call(*inputs)
                synchronize()
                samples.append(time.perf_counter() - start)
        return min(samples[1:])

    times: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        try:
            times[backend] = seconds(by(backend))
        except RuntimeError:  # no kernel of it takes the case
            continue
    return by(min(times, key=lambda backend: times[backend]))


def _flash_cache(case: Case, inputs: Inputs) -> Attention:
    """FlashAttention's decoding, of a cache that lies as it wants it."""
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    keys, values = (x.transpose(1, 2).contiguous() for x in inputs[1:])
    return lambda query, key, value: function(query.transpose(1, 2), keys, values).transpose(1, 2)


_STAIRCASES = (
    Contender("attnx-staircase", _formula(), _staircase()),
    Contender("attnx-4-bits", _formula(levels=(16, 4)), _staircase(levels=(16, 4))),
    Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
)
SUITE = Suite(
    name="staircase",
    cases=CASES,
    contenders=(
        *_STAIRCASES,
        Contender("sdpa", dense.SOFTMAX, dense.sdpa),
        Contender("grouped-matmul", dense.SOFTMAX, _math),
    ),
    baseline="sdpa",
    memory_case=_case(32768),
)

_PEERS = {"flash_attn": Contender("flash-attn-kvcache", dense.SOFTMAX, _flash_cache)}

GPU_SUITE = Suite(
    name="staircase-gpu",
    cases=GPU_CASES,
    contenders=(
        *_STAIRCASES,
        Contender("sdpa-fastest", dense.SOFTMAX, _fastest),
        *(contender for module, contender in _PEERS.items() if peers.is_installed(module)),
    ),
    baseline="sdpa-fastest",
    memory_case=_case(32768),
)
