"""Dense attention, sigmoid and softmax, beside scaled_dot_product_attention, flex_attention and the plain formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask
from torch.nn.functional import scaled_dot_product_attention

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Prepare, Suite, Unsupported

# Eager attention holds several score matrices of this size at once; above it the row says so.
LARGEST_SCORE_MATRIX = 512 * 2**20  # bytes

CASES = (
    *(Case(f"short-{n}", 8, n, n, 64, batch=4) for n in (64, 128, 256)),
    Case("256", 8, 256, 256, 64),
    Case("512", 8, 512, 512, 64),
    Case("1024", 8, 1024, 1024, 64, quick=True),
    Case("2048", 8, 2048, 2048, 64),
    Case("4096", 8, 4096, 4096, 64),
    Case("8192", 4, 8192, 8192, 64),
    Case("1024-causal", 8, 1024, 1024, 64, is_causal=True, quick=True),
    Case("4096-causal", 8, 4096, 4096, 64, is_causal=True),
    Case("d128", 8, 2048, 2048, 128),
    Case("gqa-causal", 8, 2048, 2048, 64, kv_heads=2, is_causal=True),
    Case("decode", 8, 1, 8192, 64, directions=("forward",), quick=True),
)


def _called_with_causal(function: Callable[..., Any]) -> Prepare:
    return lambda case, inputs: functools.partial(function, is_causal=case.is_causal)


def eager(weights: Callable[[Tensor], Tensor]) -> Prepare:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        query = inputs.query
        size = case.batch * case.heads * case.length_q * case.length_k * query.element_size()
        if size > LARGEST_SCORE_MATRIX:
            raise Unsupported(f"its score matrix would take {size / 2**30:.3g} GiB")
        hidden = torch.ones(case.length_q, case.length_k, dtype=torch.bool, device=query.device).triu(1)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if case.groups > 1:
                key, value = (x.repeat_interleave(case.groups, dim=1) for x in (key, value))
            logits = query / math.sqrt(case.head_dim) @ key.transpose(-1, -2)
            if case.is_causal:
                logits = logits.masked_fill(hidden, -math.inf)
            return weights(logits) @ value

        return attention

    return prepare


def sdpa(case: Case, inputs: Inputs) -> Attention:
    return functools.partial(scaled_dot_product_attention, is_causal=case.is_causal, enable_gqa=case.groups > 1)


@functools.cache
def compiled_flex_attention(dynamic: bool) -> Callable[..., Tensor]:
    # Past the limit dynamo would run it uncompiled; with fullgraph it raises.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=dynamic, fullgraph=True)


def _causal(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _flex(case: Case, inputs: Inputs) -> Attention:
    device = inputs.query.device
    on_cpu = device.type == "cpu"
    mask = None
    # Without a mask the CPU kernel takes all keys as one block, at twice the time and O(N^2) memory.
    if case.is_causal or on_cpu:
        visible = _causal if case.is_causal else noop_mask
        mask = create_block_mask(visible, None, None, case.length_q, case.length_k, device)
    # On the CPU a kernel for dynamic shapes is as fast as one for static shapes, and saves minutes of compilation.
    function = compiled_flex_attention(dynamic=on_cpu)
    return functools.partial(function, block_mask=mask, enable_gqa=case.groups > 1)


SIGMOID = Formula(
    reference=_called_with_causal(attnx.reference.sigmoid_attention),
    eager=eager(lambda logits: (logits - math.log(logits.shape[-1])).sigmoid()),
)
SOFTMAX = Formula(
    reference=_called_with_causal(attnx.reference.softmax_attention),
    eager=eager(lambda logits: logits.softmax(-1)),
)

softmax = _called_with_causal(attnx.softmax_attention)

SUITE = Suite(
    name="dense",
    cases=CASES,
    contenders=(
        Contender("attnx-sigmoid", SIGMOID, _called_with_causal(attnx.sigmoid_attention)),
        Contender("attnx-softmax", SOFTMAX, softmax),
        Contender("sdpa", SOFTMAX, sdpa),
        Contender("flex", SOFTMAX, _flex),
        Contender("eager-sigmoid", SIGMOID, SIGMOID.eager),
        Contender("eager-softmax", SOFTMAX, SOFTMAX.eager),
    ),
    baseline="sdpa",
    memory_case=Case("memory", 1, 32768, 32768, 64),
)
