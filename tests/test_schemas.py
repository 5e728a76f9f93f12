"""The operators' schemas are a promise: compiled and exported programs hold them. A change here breaks those."""

from __future__ import annotations

import pytest
import torch

QKV = "Tensor query, Tensor key, Tensor value"
PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
BIAS = "Tensor? bias, Tensor? alibi_slopes, str bias_rule, float bias_value"
MASK = "float? scale, bool is_causal, int window_left, int window_right"
BACKWARD = f"{MASK}, bool deterministic"
GRADS = "Tensor grad_query, Tensor grad_key, Tensor grad_value"

SIGMOID = f"({GRADS}, Tensor grad_bias, Tensor grad_alibi_slopes)"
SOFTMAX = f"({GRADS}, Tensor grad_alibi_slopes)"
SOFTMAX_RESULTS = "Tensor output, Tensor logsumexp"
SOFTMAX_SAVED = f"Tensor grad_output, Tensor grad_logsumexp, {QKV}, {SOFTMAX_RESULTS}"

CACHE = "Tensor state, Tensor codes, Tensor ranges, Tensor tail"
LAYOUT = "int[] levels, int window, int group, int max_length"
APPENDED = "Tensor(a!) state, Tensor(b!) codes, Tensor(c!) ranges, Tensor(d!) tail, Tensor key, Tensor value"
CROPPED = "Tensor(a!) state, Tensor codes, Tensor ranges, Tensor(b!) tail, Tensor length"
SCORE = "str score, str bias_rule, float bias_value, float? scale, bool is_causal"

SCHEMAS = [
    f"sigmoid_attention({QKV}, {BIAS}, {MASK}) -> Tensor",
    f"sigmoid_attention_varlen({QKV}, {PACKING}, {BIAS}, {MASK}) -> Tensor",
    f"sigmoid_attention_backward(Tensor grad_output, {QKV}, {BIAS}, {BACKWARD}) -> {SIGMOID}",
    f"sigmoid_attention_varlen_backward(Tensor grad_output, {QKV}, {PACKING}, {BIAS}, {BACKWARD}) -> {SIGMOID}",
    f"softmax_attention({QKV}, Tensor? alibi_slopes, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softmax_attention_varlen({QKV}, {PACKING}, Tensor? alibi_slopes, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softmax_attention_backward({SOFTMAX_SAVED}, Tensor? alibi_slopes, {BACKWARD}) -> {SOFTMAX}",
    f"softmax_attention_varlen_backward({SOFTMAX_SAVED}, {PACKING}, Tensor? alibi_slopes, {BACKWARD}) -> {SOFTMAX}",
    f"staircase_append_({APPENDED}, Tensor? counts, {LAYOUT}) -> ()",
    f"staircase_crop_({CROPPED}, {LAYOUT}) -> ()",
    f"staircase_dequantize({CACHE}, int first, int count, {LAYOUT}) -> (Tensor key, Tensor value)",
    f"staircase_attention(Tensor query, {CACHE}, Tensor? query_lengths, Tensor? bias, {LAYOUT}, {SCORE}) -> "
    f"({SOFTMAX_RESULTS})",
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_schema(schema: str) -> None:
    expected = torch._C.parse_schema(f"attnx::{schema}")
    operator = getattr(torch.ops.attnx, schema.split("(")[0]).default
    assert str(operator._schema) == str(expected)
