"""Attention with a state of one size, which goes in and comes out, beside what models run without a kernel for it."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import attnx
import attnx.reference
from suite import Attention, Case, Contender, Formula, Inputs, Suite, Unsupported
from suites import dense

LENGTHS = (512, 2048, 8192)
DECAY = 0.1  # of a token, on average


def _gates(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the gated delta rule takes besides rows."""
    query = inputs.query
    generator = torch.Generator(query.device).manual_seed(1)
    drawn = torch.randn(2, case.batch, case.heads, case.length_q, generator=generator, device=query.device)
    decay, beta = drawn.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return {"log_decay": -DECAY * decay.abs(), "beta": beta.sigmoid()}


def _delta(function: Any, **options: Any) -> Any:
    def prepare(case: Case, inputs: Inputs) -> Attention:
        gates = _gates(case, inputs)
        return functools.partial(function, **gates, **options)

    return prepare


def _token_by_token(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The definition, of rows of norm 1, in the dtype of query."""
    query, key = normalize(query, dim=-1), normalize(key, dim=-1)
    state, outputs = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3]), []
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t, :, None] for x in (query * query.shape[3] ** -0.5, key, value))
        state = state * log_decay[:, :, t, None, None].exp().to(state.dtype)
        state = state + k @ (beta[:, :, t, None, None].to(state.dtype) * (v - state.mT @ k)).mT
        outputs.append((state.mT @ q).mT)
    return torch.cat(outputs, 2)


def _transformers(case: Case, inputs: Inputs) -> Attention:
    """What Qwen3-Next runs where no package has a kernel: it takes (batch, length, heads, dim)."""
    try:
        qwen = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError as error:
        raise Unsupported(f"transformers: {error}") from error
    name = "torch_recurrent_gated_delta_rule" if case.length_q == 1 else "torch_chunk_gated_delta_rule"
    options = {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True}
    function = functools.partial(getattr(qwen, name), **options)
    gates = {name: x.transpose(1, 2) for name, x in _gates(case, inputs).items()}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return function(*rows, gates["log_decay"], gates["beta"])[0].transpose(1, 2)

    return attention


def _taylor(function: Any) -> Any:
    return lambda case, inputs: function


def _matrix_of_weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    t = query * query.shape[3] ** -0.5 @ key.mT
    weights = (1 + t + t * t / 2).tril()
    return weights @ value / weights.sum(-1, keepdim=True)


def _taylor_eager(case: Case, inputs: Inputs) -> Attention:
    size = case.batch * case.heads * case.length_q * case.length_k * inputs.query.element_size()
    if size > dense.LARGEST_SCORE_MATRIX:
        raise Unsupported(f"its matrix of weights would take {size / 2**30:.3g} GiB")
    return _matrix_of_weights


DELTA = Formula(_delta(attnx.reference.gated_delta_rule, normalize_qk=True), _delta(_token_by_token))
TAYLOR = Formula(_taylor(attnx.reference.linear_attention), _taylor_eager)

DELTA_SUITE = Suite(
    "delta-rule",
    (
        *(Case(str(n), 16, n, n, 128, is_causal=True, quick=n == LENGTHS[0]) for n in LENGTHS),
        Case("token", 16, 1, 1, 128, is_causal=True, directions=("forward",)),
    ),
    (
        Contender("attnx-delta-rule", DELTA, _delta(attnx.gated_delta_rule, normalize_qk=True)),
        Contender("transformers", DELTA, _transformers),
    ),
    baseline="transformers",
    memory_case=Case("memory", 16, 2048, 2048, 128, is_causal=True),
)
TAYLOR_SUITE = Suite(
    "taylor",
    tuple(Case(str(n), 16, n, n, 16, is_causal=True, quick=n == LENGTHS[0]) for n in LENGTHS),
    (
        Contender("attnx-taylor", TAYLOR, _taylor(attnx.linear_attention)),
        Contender("attnx-softmax", dense.SOFTMAX, dense.softmax),
        Contender("eager-taylor", TAYLOR, _taylor_eager),
    ),
    baseline="eager-taylor",
    memory_case=Case("memory", 16, 2048, 2048, 16, is_causal=True),
)
