"""The operators' schemas are a promise: compiled and exported programs hold them. A change here breaks those."""

from __future__ import annotations

import pytest
import torch

from test_operators import NAMES

QK = "Tensor query, Tensor key"
QKV = f"{QK}, Tensor value"
PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
LENGTHS = "Tensor? seqused_k, Tensor? leftpad_k"
PADDED = f"{PACKING}, bool has_padding"
BIAS = "Tensor? bias, Tensor? alibi_slopes, str bias_rule, float bias_value"
MASK = "float? scale, bool is_causal, int window_left, int window_right, SymInt position_offset"
KEY_TERMS = "float? softcap, Tensor? key_bias, Tensor? key_mask, float dropout_p, Tensor? seed, Tensor? offset"
TERMS = f"Tensor? attn_mask, Tensor? distance_bias, Tensor? row_bounds, {KEY_TERMS}"
WANTED_OF_KEYS = "bool key_bias_gradient, bool key_mask_gradient, bool deterministic"
WANTED = f"bool attn_mask_gradient, bool distance_bias_gradient, {WANTED_OF_KEYS}"
WANTED_OF_BLOCKS = WANTED.replace("bool deterministic", "bool block_bias_gradient, bool deterministic")
WANTED_OF_PACKED_BLOCKS = WANTED_OF_KEYS.replace("bool deterministic", "bool block_bias_gradient, bool deterministic")
GRADS = "Tensor grad_query, Tensor grad_key, Tensor grad_value"

KEY_TERM_GRADS = "Tensor grad_key_bias, Tensor grad_key_mask"
TERM_GRADS = f"Tensor grad_attn_mask, Tensor grad_distance_bias, {KEY_TERM_GRADS}"
SIGMOID = f"{GRADS}, Tensor grad_bias, Tensor grad_alibi_slopes"
SOFTMAX = f"{GRADS}, Tensor grad_alibi_slopes, Tensor grad_sink"
SOFTMAX_RESULTS = "Tensor output, Tensor logsumexp"
SOFTMAX_SAVED = f"Tensor grad_output, Tensor grad_logsumexp, {QKV}, {SOFTMAX_RESULTS}"

CACHE = "Tensor state, Tensor codes, Tensor ranges, Tensor tail"
LAYOUT = "int[] levels, int window, int group, int residual, int max_length"
APPENDED = "Tensor(a!) state, Tensor(b!) codes, Tensor(c!) ranges, Tensor(d!) tail, Tensor key, Tensor value"
CROPPED = "Tensor(a!) state, Tensor codes, Tensor ranges, Tensor(b!) tail, Tensor length"
NEW_MEMORY = "Tensor new_state, Tensor new_codes, Tensor new_ranges, Tensor new_tail"
ASSIGNED = APPENDED.replace("Tensor key, Tensor value", NEW_MEMORY)
RULE = "str score, str bias_rule, float bias_value"
SCORE = f"{RULE}, float? scale, bool is_causal"

LISTS = "Tensor kv_num_blocks, Tensor kv_indices"
SINKS = "Tensor? alibi_slopes, Tensor? sink"
LISTED = f"{LISTS}, Tensor? block_bias, Tensor? sink"
QUERY_LISTS = "Tensor? q_num_blocks, Tensor? q_indices, Tensor? q_block_bias"
BLOCKS = "int block_q, int block_k"
DRAWN = f"Tensor keep, Tensor seed, Tensor offset, SymInt blocks_per_row, bool importance, {BLOCKS}"

GRID = f"SymInt length_q, SymInt length_k, {BLOCKS}, bool is_causal"

TABLES = "Tensor? query_table, Tensor? key_table, Tensor table_index"

MAP = f"Tensor block_map, {BLOCKS}, str feature_map, str linear_scope, float? scale, bool is_causal"
MAPPED = (
    f"{BLOCKS}, float critical, float negligible, str rounding, bool smooth_k, SymInt protect, float? scale, "
    "bool is_causal"
)
PARTS = "Tensor sparse, Tensor linear, Tensor logsumexp"
PART_GRADS = "Tensor grad_sparse, Tensor grad_linear, Tensor grad_logsumexp"

ROUTES = "Tensor query_indices, Tensor query_offsets, Tensor key_indices, Tensor key_offsets"
ROUTED = f"{ROUTES}, Tensor? lead, Tensor? memory_key, Tensor? memory_value"
AROUND = "Tensor query, Tensor key, Tensor centroids"
USED = "Tensor? seqused_q, Tensor? leftpad_q, Tensor? seqused_k, Tensor? leftpad_k"
ROUTING = "SymInt cluster_size_q, SymInt cluster_size_k, str routing, bool shared_qk"
SHARPENED_RESULTS = f"{SOFTMAX_RESULTS}, Tensor gain, Tensor shift"
SHARPENED_SAVED = f"Tensor grad_output, {QKV}, {SHARPENED_RESULTS}"

TANGENTS = "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value"

DELTA = f"{QKV}, Tensor log_decay, Tensor beta, Tensor? initial_state, Tensor? carry, float? scale, bool normalize_qk"

STATE = f"{QKV}, Tensor? initial_state, str feature_map, float? scale, bool is_causal"

SCHEMAS = [
    f"sigmoid_attention({QKV}, {LENGTHS}, {BIAS}, {TERMS}, {MASK}) -> Tensor",
    f"sigmoid_attention_varlen({QKV}, {PADDED}, {BIAS}, {KEY_TERMS}, {MASK}) -> Tensor",
    f"sigmoid_attention_backward(Tensor grad_output, {QKV}, {LENGTHS}, {BIAS}, {TERMS}, {MASK}, {WANTED}) -> "
    f"({SIGMOID}, {TERM_GRADS})",
    f"sigmoid_attention_varlen_backward(Tensor grad_output, {QKV}, {PADDED}, {BIAS}, {KEY_TERMS}, {MASK}, "
    f"{WANTED_OF_KEYS}) -> ({SIGMOID}, {KEY_TERM_GRADS})",
    f"softmax_attention({QKV}, {LENGTHS}, {SINKS}, {TERMS}, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softmax_attention_varlen({QKV}, {PADDED}, {SINKS}, {KEY_TERMS}, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softmax_attention_backward({SOFTMAX_SAVED}, {LENGTHS}, {SINKS}, {TERMS}, {MASK}, {WANTED}) -> "
    f"({SOFTMAX}, {TERM_GRADS})",
    f"softmax_attention_varlen_backward({SOFTMAX_SAVED}, {PADDED}, {SINKS}, {KEY_TERMS}, {MASK}, {WANTED_OF_KEYS}) -> "
    f"({SOFTMAX}, {KEY_TERM_GRADS})",
    f"sigmoid_attention_jvp({QKV}, {TANGENTS}, str bias_rule, float bias_value, {MASK}) -> (Tensor output, "
    "Tensor tangent_output)",
    f"softmax_attention_jvp({QKV}, {TANGENTS}, {MASK}) -> ({SOFTMAX_RESULTS}, Tensor tangent_output, "
    "Tensor tangent_logsumexp)",
    f"block_sparse_attention({QKV}, {LENGTHS}, {LISTED}, {TERMS}, {BLOCKS}, {SCORE}) -> ({SOFTMAX_RESULTS})",
    f"block_sparse_attention_backward({SOFTMAX_SAVED}, {LENGTHS}, {LISTED}, {TERMS}, {QUERY_LISTS}, {BLOCKS}, {SCORE}, "
    f"{WANTED_OF_BLOCKS}) "
    f"-> ({GRADS}, Tensor grad_sink, {TERM_GRADS}, Tensor grad_block_bias)",
    f"block_sparse_attention_varlen({QKV}, {PADDED}, {LISTED}, {KEY_TERMS}, {BLOCKS}, {SCORE}) -> ({SOFTMAX_RESULTS})",
    f"block_sparse_attention_varlen_backward({SOFTMAX_SAVED}, {PADDED}, {LISTED}, {KEY_TERMS}, {QUERY_LISTS}, "
    f"{BLOCKS}, {SCORE}, {WANTED_OF_PACKED_BLOCKS}) -> ({GRADS}, Tensor grad_sink, {KEY_TERM_GRADS}, "
    "Tensor grad_block_bias)",
    f"disentangled_attention({QKV}, {TABLES}, {KEY_TERMS}, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"disentangled_attention_backward({SOFTMAX_SAVED}, {TABLES}, {KEY_TERMS}, {MASK}, bool query_table_gradient, "
    f"bool key_table_gradient, {WANTED_OF_KEYS}) -> ({GRADS}, Tensor grad_query_table, Tensor grad_key_table, "
    f"{KEY_TERM_GRADS})",
    f"linear_attention({STATE}, bool return_state) -> (Tensor output, Tensor state)",
    f"linear_attention_backward(Tensor? grad_output, Tensor? grad_state, {STATE}) -> ({GRADS}, "
    "Tensor grad_initial_state)",
    f"gated_delta_rule({DELTA}) -> (Tensor output, Tensor state)",
    f"gated_delta_rule_backward(Tensor? grad_output, Tensor? grad_state, {DELTA}) -> ({GRADS}, Tensor grad_log_decay, "
    "Tensor grad_beta, Tensor grad_initial_state, Tensor grad_carry)",
    f"softplus_attention({QKV}, {LENGTHS}, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softplus_attention_varlen({QKV}, {PADDED}, {MASK}) -> ({SOFTMAX_RESULTS})",
    f"softplus_attention_backward({SOFTMAX_SAVED}, {LENGTHS}, {MASK}, bool deterministic) -> ({GRADS})",
    f"softplus_attention_varlen_backward({SOFTMAX_SAVED}, {PADDED}, {MASK}, bool deterministic) -> ({GRADS})",
    f"sharpened_softplus_attention({QKV}, {LENGTHS}, {MASK}, int power) -> ({SHARPENED_RESULTS})",
    f"sharpened_softplus_attention_varlen({QKV}, {PADDED}, {MASK}, int power) -> ({SHARPENED_RESULTS})",
    f"sharpened_softplus_attention_backward({SHARPENED_SAVED}, {LENGTHS}, {MASK}, int power, bool deterministic) -> "
    f"({GRADS})",
    f"sharpened_softplus_attention_varlen_backward({SHARPENED_SAVED}, {PADDED}, {MASK}, int power, bool deterministic) "
    f"-> ({GRADS})",
    f"attention_key_weights({QK}, Tensor? logsumexp, Tensor? row_weights, {RULE}, {MASK}) -> Tensor",
    f"attention_row_weights({QK}, Tensor? logsumexp, {RULE}, {MASK}) -> Tensor",
    f"attention_max_logits({QK}, {MASK}) -> Tensor",
    f"pointer_sample({QK}, float? softcap, Tensor? attn_mask, Tensor? key_bias, Tensor? key_mask, float temperature, "
    f"Tensor? seed, Tensor? offset, {MASK}) -> Tensor",
    f"probabilistic_attention({QKV}, {LENGTHS}, {DRAWN}, {SCORE}) -> ({SOFTMAX_RESULTS})",
    f"probabilistic_attention_varlen({QKV}, {PADDED}, {DRAWN}, {SCORE}) -> ({SOFTMAX_RESULTS})",
    f"probabilistic_attention_backward({SOFTMAX_SAVED}, {LENGTHS}, {DRAWN}, {SCORE}, bool deterministic) -> ({GRADS})",
    f"probabilistic_attention_varlen_backward({SOFTMAX_SAVED}, {PADDED}, {DRAWN}, {SCORE}, bool deterministic) -> "
    f"({GRADS})",
    "probabilistic_block_lists(Tensor keep, Tensor seed, Tensor offset, SymInt batch, SymInt heads, SymInt length_q, "
    f"SymInt length_k, {BLOCKS}, SymInt blocks_per_row, bool is_causal) -> ({LISTS})",
    f"probabilistic_keep(Tensor seed, str family, float density, {GRID}) -> Tensor",
    f"probabilistic_blocks_per_row(Tensor seed, str? family, float? density, {GRID}) -> SymInt",
    f"sparse_linear_attention({QKV}, {LENGTHS}, {MAP}) -> ({PARTS})",
    f"sparse_linear_attention_varlen({QKV}, {PACKING}, {MAP}) -> ({PARTS})",
    f"sparse_linear_attention_backward({PART_GRADS}, {QKV}, {PARTS}, {LENGTHS}, {MAP}, bool deterministic) -> "
    f"({GRADS})",
    f"sparse_linear_attention_varlen_backward({PART_GRADS}, {QKV}, {PARTS}, {PACKING}, {MAP}, bool deterministic) -> "
    f"({GRADS})",
    f"sparse_linear_block_map(Tensor query, Tensor key, {LENGTHS}, {MAPPED}) -> Tensor",
    f"sparse_linear_block_map_varlen(Tensor query, Tensor key, {PACKING}, {MAPPED}) -> Tensor",
    f"sparse_linear_labels(Tensor products, SymInt length_q, SymInt length_k, {BLOCKS}, float critical, "
    "float negligible, str rounding, bool is_causal, SymInt protect) -> Tensor",
    f"routing_attention({QKV}, {ROUTED}, {SCORE}) -> ({SOFTMAX_RESULTS})",
    f"routing_attention_backward({SOFTMAX_SAVED}, {ROUTED}, {SCORE}, bool deterministic) -> "
    f"({GRADS}, Tensor grad_memory_key, Tensor grad_memory_value)",
    f"route({AROUND}, {USED}, {ROUTING}) -> ({ROUTES})",
    f"route_varlen({AROUND}, {PADDED}, {ROUTING}) -> ({ROUTES})",
    f"move_centroids_in_backward({AROUND}, Tensor counts, {USED}, float decay, str group) -> Tensor",
    "move_average_in_backward(Tensor x, Tensor average, Tensor target, float decay) -> Tensor",
    "nearest_centroids(Tensor rows, Tensor centroids, Tensor? seqused, Tensor? leftpad) -> Tensor",
    f"centroid_sums({AROUND}, {USED}) -> (Tensor sums, Tensor members)",
    "update_centroids_(Tensor(a!) centroids, Tensor(b!) counts, Tensor sums, Tensor members, float decay) -> ()",
    "range_means(Tensor rows, Tensor ranges) -> Tensor",
    "block_means(Tensor rows, int block) -> Tensor",
    "block_statistics(Tensor rows, int block) -> (Tensor means, Tensor deviations)",
    f"staircase_append_({APPENDED}, Tensor? counts, {LAYOUT}) -> ()",
    f"staircase_crop_({CROPPED}, {LAYOUT}) -> ()",
    f"staircase_assign_({ASSIGNED}, {LAYOUT}) -> ()",
    f"staircase_dequantize({CACHE}, int first, int count, {LAYOUT}) -> (Tensor key, Tensor value)",
    f"staircase_attention(Tensor query, {CACHE}, Tensor? query_lengths, Tensor? bias, {LAYOUT}, {SCORE}) -> "
    f"({SOFTMAX_RESULTS})",
]


def test_every_operator_is_guarded() -> None:
    assert sorted(schema.split("(")[0] for schema in SCHEMAS) == NAMES


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_schema(schema: str) -> None:
    expected = torch._C.parse_schema(f"attnx::{schema}")
    operator = getattr(torch.ops.attnx, schema.split("(")[0]).default
    assert str(operator._schema) == str(expected)
