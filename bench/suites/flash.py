"""The shapes of FlashAttention's own benchmark, for GPUs: 16384 tokens in all, 2048 features over all heads; and
decoding, one query against long caches."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import attnx
from suite import Attention, Case, Contender, Inputs, Prepare, Suite
from suites import dense, peers

TOKENS, FEATURES = 16384, 2048


def _case(head_dim: int, length: int, is_causal: bool) -> Case:
    return Case(
        f"d{head_dim}-{length}" + ("-causal" if is_causal else ""),
        FEATURES // head_dim,
        length,
        length,
        head_dim,
        batch=TOKENS // length,
        is_causal=is_causal,
        quick=length == 512,
        heads_inside=True,
    )


def _decode(length: int) -> Case:
    return Case(
        f"decode-{length}",
        32,
        1,
        length,
        128,
        batch=4,
        kv_heads=8,
        directions=("forward",),
        quick=length == 8192,
        heads_inside=True,
    )


# The longest first: should time run out, these say most.
CASES = (
    *(_case(d, n, c) for n in (16384, 8192, 4096, 2048, 1024, 512) for d in (128, 64, 256) for c in (False, True)),
    *(_decode(n) for n in (65536, 32768, 16384, 8192)),
)


def _sdpa(backend: SDPBackend) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        function = functools.partial(scaled_dot_product_attention, is_causal=case.is_causal, enable_gqa=case.groups > 1)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return function(query, key, value)

        return attention

    return prepare


def _on_sm80(ours: Contender) -> Contender:
    """The mainloop of every device, on one that has another."""

    def prepare(case: Case, inputs: Inputs) -> Attention:
        function = ours.prepare(case, inputs)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with attnx.cuda_mainloop("sm80"):
                return function(query, key, value)

        return attention

    return Contender(f"{ours.name}-sm80", ours.formula, prepare)


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


_OURS = tuple(contender for contender in dense.SUITE.contenders if contender.ours)
_FLASH = Contender("sdpa-flash", dense.SOFTMAX, _sdpa(SDPBackend.FLASH_ATTENTION))  # FlashAttention-2

SUITE = Suite(
    name="flash",
    cases=CASES,
    contenders=(
        *_OURS,
        *(map(_on_sm80, _OURS) if _is_hopper() else ()),
        _FLASH,
        Contender("sdpa-cudnn", dense.SOFTMAX, _sdpa(SDPBackend.CUDNN_ATTENTION)),
        *peers.installed(),
    ),
    baseline=_FLASH.name,
    memory_case=_case(128, 16384, False),
)

# What the same sums in the same order every time cost, ours and FlashAttention-2's.
DETERMINISTIC_SUITE = Suite(
    name="deterministic",
    cases=tuple(replace(case, directions=("backward",)) for case in CASES if case.length_q == 4096),
    contenders=tuple(
        contender
        for plain in (*_OURS, _FLASH)
        for contender in (plain, replace(plain, name=f"{plain.name}-deterministic", deterministic=True))
    ),
    baseline=_FLASH.name,
    memory_case=_case(128, 16384, False),
)

# Apart, because it is compiled for each shape, for seconds; and at few of the shapes.
FLEX_SUITE = Suite(
    name="flex",
    cases=tuple(case for case in CASES if case.head_dim in (64, 128) and case.length_q == 4096),
    contenders=(*_OURS, _FLASH, next(c for c in dense.SUITE.contenders if c.name == "flex")),
    baseline=_FLASH.name,
    memory_case=_case(128, 16384, False),
)
