"""The faults that tests/mutants.py plants: an expression, what takes its place, and the tests that should mind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """An expression of a file, which stands between « and » in ``text`` or is all of it.

    ``tests`` are arguments of pytest: a file, and ``-k`` with an expression where few of its tests will do.
    """

    file: str
    text: str
    fault: str
    tests: str

    def place(self, source: str) -> tuple[int, int]:
        """Where the expression starts and ends in the file."""
        before, bracket, rest = self.text.partition("«")
        expression, _, after = rest.partition("»") if bracket else (before, "", "")
        before = before if bracket else ""
        text = before + expression + after
        if source.count(text) != 1:
            raise SystemExit(f"{self.file}: expected {text!r} once, got it {source.count(text)} times")
        start = source.index(text) + len(before)
        return start, start + len(expression)


LABELS, SHARES, CLUSTERS = "csrc/cpu/labels.cpp", "csrc/attnx/block_labels.h", "csrc/cpu/clusters.cpp"
SAMPLING, DRAWS = "csrc/cpu/sampling.cpp", "csrc/attnx/block_sampling.h"
STATE, LAYOUT = "csrc/attnx/staircase_state.h", "csrc/attnx/staircase.h"
SUMS = "csrc/cpu/sums.cpp"
ARGUMENTS, LISTS = "csrc/torch/arguments.cpp", "csrc/torch/block_sparse.cpp"
CACHE, ROUTES = "csrc/torch/staircase_cache.cpp", "csrc/torch/routes.cpp"
ROUTE_ROWS, CENTROIDS = "csrc/torch/route_rows.cpp", "csrc/torch/centroids.cpp"
K = "csrc/cpu/kernel/"
SOFTMAX, SIGMOID = K + "score/softmax.h", K + "score/sigmoid.h"
SOFTPLUS, SHARPENED = K + "score/softplus.h", K + "score/sharpened_softplus.h"
BAND, LISTED, CLUSTERED = K + "tiles/band.h", K + "tiles/listed.h", K + "tiles/clustered.h"
QUERIES, KEYS, PANEL = K + "lanes/queries.h", K + "lanes/keys.h", K + "panel.h"
FORWARD, BACKWARD = K + "forward.h", K + "backward.h"
TILE, SPLITS = K + "backward/tile.h", K + "backward/sums.h"
GATHERED, ROUTED, PLACES = K + "storage/gathered.h", K + "routing/attention.h", K + "routing/places.h"
TERMS, TERM_TILE, TERM_SUMS = "csrc/torch/terms.cpp", K + "logits/tile.h", K + "logits/sums.h"
TERM_LOOPS, TABLES = K + "logits/terms.h", K + "logits/table_rows.h"
DISENTANGLED = "csrc/torch/disentangled.cpp"
RANGES, RANGE_CHECKS = K + "range_means.h", "csrc/torch/range_means.cpp"
RECTIFIED, HIERARCHICAL = "python/attnx/rectified.py", "python/attnx/hierarchical.py"
HEADS = "python/attnx/nn/head_routing.py"
MAP, DROPOUT = K + "block_products.h", K + "random.h"
SELECT, NEAREST, PRODUCTS = K + "routing/select.h", K + "routing/nearest.h", K + "routing/products.h"
FEATURES, OPERANDS, BLOCK_SUMS = K + "linear/features.h", K + "linear/operands.h", K + "linear/block_sums.h"
LINEAR, LINEAR_BACKWARD = K + "linear/forward.h", K + "linear/backward.h"
TRIANGLE, DELTA, DELTA_STEP = K + "triangle.h", K + "delta_rule/chunk.h", K + "delta_rule/step.h"
DELTA_GRADIENTS, DELTA_BACKWARD = K + "delta_rule/gradients.h", K + "delta_rule/backward.h"
GATED = "csrc/torch/gated_delta_rule.cpp"
STATES, STATES_FORWARD = K + "linear_state/chunk.h", K + "linear_state/forward.h"
STATES_BACKWARD = K + "linear_state/backward.h"
STAIRCASE, ENCODE, DECODE = K + "staircase.cpp", K + "staircase/encode.h", K + "storage/staircase.h"
ROWS, TANGENT_ROWS = K + "epilogue/output.h", K + "epilogue/tangents.h"
TANGENTS, JVP = K + "tangents/given.h", "csrc/torch/jvp.cpp"
ALONG, GRADIENTS = "python/attnx/_operators/tangents.py", "python/attnx/_operators/gradients.py"

_INPUT = (
    Mutant(ARGUMENTS, "share >= 0 && share <= 1", "true", "test_fuzz.py -k shares"),
    Mutant(ARGUMENTS, "critical + negligible <= 1", "true", "test_fuzz.py -k shares"),
    Mutant(ARGUMENTS, "offsets[0] == 0", "true", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "check(«length >= 0», name", "length >= -9", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "offsets[last] == rows", "offsets[last] >= rows", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "max_seqlen >= longest", "max_seqlen >= longest - 1", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "dim <= row.head_dim_max", "dim <= row.head_dim_max + 1", "test_bad_input.py -k dense"),
    Mutant(ARGUMENTS, "window.is_causal ? «0» :", "1", "test_softmax_attention.py -k causal"),
    Mutant(ARGUMENTS, "? «!std::isnan(x)» :", "true", "test_bad_input.py -k sink_nan"),
    Mutant(LISTS, "*count <= width", "*count <= width + 1", "test_block_sparse.py -k bad"),
    Mutant(LISTS, "row[n] < blocks", "row[n] <= blocks", "test_block_sparse.py -k bad"),
    Mutant(CACHE, "l.window % l.group == 0", "true", "test_staircase.py -k layout"),
    Mutant(
        CACHE, "is_reachable(cache.memory.layout, max_length, cache.state_of(b))", "true", "test_staircase.py -k bad"
    ),
    Mutant(CACHE, "(x[i] & kMagnitude) <= limit", "true", "test_staircase.py -k bad"),
    Mutant(CENTROIDS, "count >= 0 && std::isfinite(count)", "true", "test_routing.py -k count"),
    Mutant(CENTROIDS, "a.decay >= 0 && a.decay <= 1", "true", "test_routing.py -k decay"),
)
_FORWARD = (
    Mutant(SOFTMAX, "? «0 * sum_[lane]» :", "1 / sum_[lane]", "test_hidden_rows.py"),
    Mutant(SOFTMAX, "highest == -kInfinity ? Vec<Sum>{} : highest", "highest", "test_hidden_rows.py"),
    Mutant(SOFTMAX, "__builtin_memcmp(&before, &highest, sizeof before) != 0", "false", "test_softmax_attention.py"),
    Mutant(SOFTMAX, "sum_[row] *= «factor»", "Sum(1)", "test_sink.py -k few_queries"),
    Mutant(
        SOFTMAX, "first_keys ? «panel.per_head(p.sink, panel.head[lane], -kInfinity)» :", "-kInfinity", "test_sink.py"
    ),
    Mutant(SIGMOID, "return «e * complement»", "e * complement + 1e-38f", "test_hidden_rows.py"),
    Mutant(SIGMOID, "exp(«at_most(x, 86.0f)»)", "x", "test_sigmoid_attention.py -k saturated"),
    Mutant(
        SIGMOID,
        "weight_and_complement(x[k], «on_tile.divisor», complement)",
        "Sum(1)",
        "test_probabilistic.py -k gradcheck",
    ),
    Mutant(PANEL, "bias[lane] -= «log(s.length_k)»", "Sum(0)", "test_sigmoid_attention.py -k shapes"),
    Mutant(
        PANEL, "log(«tiles.keys_in_band(position[lane])»)", "s.length_k", "test_sigmoid_attention.py -k bias_and_alibi"
    ),
    Mutant(
        PANEL,
        "position[lane] = «query[lane] + s.length_k - s.length_q»",
        "query[lane]",
        "test_softmax_attention.py -k causal",
    ),
    Mutant(
        PANEL,
        "seen.first = «smaller(larger(seen.first, part.first), part.end)»",
        "seen.first",
        "test_determinism.py -k parts",
    ),
    Mutant(BAND, "larger(«position + right_ + 1», first)", "position + right_", "test_softmax_attention.py -k masks"),
    Mutant(BAND, "«position - left_», 0", "position - left_ + 1", "test_softmax_attention.py -k masks"),
    Mutant(LISTED, "if («is_hidden(i)») continue;", "false", "test_hidden_rows.py"),
    Mutant(LISTED, "bias_ ? bias_[i] : 0", "0.0f", "test_block_sparse.py -k block_bias"),
    Mutant(LISTED, "divisor_ ? divisor_[i] : 1", "1.0f", "test_probabilistic.py -k definition"),
    Mutant(
        LISTED, "larger(hull_.end, smaller(first + block_, length_))", "hull_.end", "test_block_sparse.py -k any_order"
    ),
    Mutant(
        QUERIES,
        "!on_tile.masked || «(*finite)(values, round_up(tile.count, A::kStep) * value_stride_)»",
        "true",
        "test_nonfinite.py",
    ),
    Mutant(KEYS, "!on_tile.masked || values_finite(steps)", "true", "test_nonfinite.py"),
    Mutant(
        KEYS,
        "weigh_row(products_ + row * kKeys, padded, «Sum(p_.scale)»",
        "Sum(1)",
        "test_softmax_attention.py -k shapes",
    ),
    Mutant(ROWS, "total == 0 ? 0 : output[d] / total", "output[d]", "test_determinism.py -k parts"),
    Mutant(
        ROWS,
        "Sum(__builtin_exp(logsumexp - (highest_ == -kInfinity ? 0 : highest_)))",
        "Sum(1)",
        "test_determinism.py -k parts",
    ),
    Mutant(
        ROWS, "total == 0 ? highest_ : highest_ + Sum(__builtin_log(total))", "highest_", "test_determinism.py -k parts"
    ),
    Mutant(FORWARD, "b.work.begin(panels, panel, sequence, «part == 0»,", "true", "test_sink.py -k few_queries"),
    Mutant(FORWARD, "if («parts_ > 1») panel.clip", "false", "test_determinism.py -k parts"),
    Mutant(FORWARD, "if («p.length_q * rows_.group <= kFewRows») parts_", "false", "test_long_sums.py"),
)
_BACKWARD = (
    Mutant(SOFTMAX, "-weight * double(offset_[lane])", "weight * double(offset_[lane])", "test_sink.py"),
    Mutant(SOFTMAX, "double weight = «sees_nothing(panel, lane)» ?", "false", "test_sink.py -k logsumexp"),
    Mutant(
        K + "score/normalised.h",
        "*row_of<const Sum>(p.grad_logsumexp, s.batch, head, result)",
        "Sum(0)",
        "test_softmax_attention.py -k differentiable",
    ),
    Mutant(
        SIGMOID,
        "ds = «p * complement * (on_tile.divisor * dp)»",
        "p * complement * dp",
        "test_probabilistic.py -k gradcheck",
    ),
    Mutant(
        TILE,
        "slope += «ds[k] * absolute(position - Sum(key + k))»",
        "ds[k]",
        "test_sigmoid_attention.py -k bias_and_alibi",
    ),
    Mutant(TILE, "bias += «ds[k]»", "p", "test_gradients.py -k bias"),
    Mutant(TILE, "!on_tile.masked || finite(other, count)", "true", "test_nonfinite.py"),
    Mutant(
        SPLITS,
        "x.grad_key + key * sizes.head_lanes; }, «Sum(p.scale)»",
        "Sum(1)",
        "test_softmax_attention.py -k shapes",
    ),
    Mutant(SPLITS, "«split < splits»; ++split) {", "split < 1", "test_determinism.py -k number_of_threads"),
    Mutant(SPLITS, "«split < splits»; ++split) sum +=", "split < 1", "test_determinism.py -k number_of_threads"),
    Mutant(SPLITS, "if («!addend.data») return", "true", "test_sparse_linear.py -k gradcheck"),
    Mutant(BACKWARD, "p_.key_blocks.width + «place»", "0", "test_block_bias_gradient.py -k definition"),
    Mutant(SOFTPLUS, "«(x < 0 ? e : 1 + V{})» * reciprocal", "(1 + V{})", "test_softplus.py -k definition"),
    Mutant(SOFTPLUS, "ds = softplus_slope(x, e) * «inverse» *", "splat(Sum(1))", "test_softplus.py -k definition"),
    Mutant(SHARPENED, "return «v <= lowest_ ? Vec<Sum>{} : v»;", "v", "test_softplus.py -k definition"),
    Mutant(SHARPENED, "«rows_.shift(lane) == 0» ? 0", "false", "test_softplus.py -k definition"),
    Mutant(SHARPENED, "(own - «of_mean»)", "Vec<Sum>{}", "test_softplus.py -k definition"),
    Mutant(K + "weights/softplus_rows.h", "keys > kKeysWithoutMean ? 1 : «0»", "1", "test_softplus.py -k definition"),
    Mutant(BACKWARD, "sum[d] *= «Sum(p_.scale)»", "Sum(1)", "test_softmax_attention.py -k shapes"),
    Mutant(SUMS, "sum += «p.from[b * p.heads + h]»", "p.from[h]", "test_determinism.py -k number_of_threads"),
)
_SPARSE_LINEAR = (
    Mutant(LABELS, "? «rank > other.rank» :", "rank < other.rank", "test_sparse_linear.py -k map"),
    Mutant(LABELS, "index < other.index", "index > other.index", "test_sparse_linear.py -k map"),
    Mutant(LABELS, "if («x != x») return", "false", "test_sparse_linear.py -k selection"),
    Mutant(LABELS, "std::bit_cast<std::uint64_t>(«x + 0.0»)", "x", "test_sparse_linear.py -k selection"),
    Mutant(
        LABELS,
        "labels[block * block_stride] == 1",
        "labels[block * block_stride] >= 0",
        "test_sparse_linear.py -k definition",
    ),
    Mutant(SHARES, "end = «grid.is_causal» ?", "false", "test_sparse_linear.py -k map"),
    Mutant(SHARES, "larger(1, larger(most, unranked))", "larger(most, unranked)", "test_sparse_linear.py -k map"),
    Mutant(
        SHARES,
        "shares.round_down ? floor(share) : ceil(share)",
        "shares.round_down ? ceil(share) : floor(share)",
        "test_sparse_linear.py -k map",
    ),
    Mutant(
        SHARES,
        "nearbyint(share * double(count) * 0x1p30) * 0x1p-30",
        "share * double(count)",
        "test_sparse_linear.py -k shares",
    ),
    Mutant(MAP, "int(p_.scale > 0) - int(p_.scale < 0)", "1", "test_sparse_linear.py -k sign"),
    Mutant(FEATURES, "v > 0 ? «v + Sum(1)» :", "v", "test_sparse_linear.py -k gradcheck"),
    Mutant(FEATURES, "phi[d] > 0 ? grad[d] : 0", "grad[d]", "test_sparse_linear.py -k definition"),
    Mutant(FEATURES, "smaller(phi[d], Sum(1))", "Sum(1)", "test_sparse_linear.py -k gradcheck"),
    Mutant(FEATURES, "grad[d] = phi[d] * («grad[d] - dot»)", "grad[d]", "test_sparse_linear.py -k definition"),
    Mutant(OPERANDS, "(label <= p.scope_high)", "true", "test_sparse_linear.py -k definition"),
    Mutant(
        OPERANDS,
        "end = «visible(s, q.first + i) - k.first»",
        "visible(s, q.first + i) - k.first + 1",
        "test_sparse_linear.py -k definition",
    ),
    Mutant(LINEAR, "factor = «n == 0 ? 0 : 1 / n»", "1 / n", "test_sparse_linear.py -k scopes"),
    Mutant(BLOCK_SUMS, "sum[v] -= «load(from + v * kLanes<Sum>)»", "Vec<Sum>{}", "test_sparse_linear.py -k scopes"),
    Mutant(BLOCK_SUMS, "i % kGroup == 0", "i == 0", "test_sparse_linear.py -k scopes"),
    Mutant(LINEAR_BACKWARD, "stats[i].last = «-dot» * ", "dot", "test_sparse_linear.py -k gradcheck"),
    Mutant(
        LINEAR_BACKWARD,
        "«stats[i].inverse == 0 ? 0 : 1 / stats[i].inverse»",
        "1 / stats[i].inverse",
        "test_sparse_linear.py -k scopes",
    ),
    Mutant(
        LINEAR_BACKWARD,
        "x_.seen_by_all(s, blocks - 1 - seen) > first + j",
        "x_.seen_by_all(s, blocks - 1 - seen) >= first + j",
        "test_sparse_linear.py -k gradcheck",
    ),
    Mutant(LINEAR_BACKWARD, "block < x_.seen_by_all(s, i)", "false", "test_sparse_linear.py -k gradcheck"),
)
_SAMPLING = (
    Mutant(DRAWS, "{{«std::uint32_t(j)», std::uint32_t(i)", "std::uint32_t(i)", "test_probabilistic.py -k reference"),
    Mutant(DRAWS, "2 * log + two_or_more", "2 * log", "test_probabilistic.py -k reference"),
    Mutant(DRAWS, "j - diagonal_end + 1", "j - diagonal_end", "test_probabilistic.py -k reference"),
    Mutant(DRAWS, "candidates = sees_none ? 0 : «grid.is_causal» ?", "false", "test_probabilistic.py -k reference"),
    Mutant(SAMPLING, "if («distance == 0») {", "false", "test_probabilistic.py -k reference"),
    Mutant(SAMPLING, "p.blocks_per_row - (end - kept)", "p.blocks_per_row", "test_probabilistic.py -k topm"),
    Mutant(
        SAMPLING,
        "p.logarithm ? -std::log(probability) : probability",
        "probability",
        "test_probabilistic.py -k definition",
    ),
)
_ROUTING = (
    Mutant(SELECT, "? «at_least(Rank(low + 1))» :", "at_least(low)", "test_routing.py -k reference"),
    Mutant(SELECT, "ranks > load(m.bounds + lane)", "ranks >= load(m.bounds + lane)", "test_routing.py -k finite"),
    Mutant(SELECT, "equals-- <= 0", "equals++ <= 0", "test_routing.py -k ties"),
    Mutant(NEAREST, "best[i] == highest && index[i] > nearest", "false", "test_routing.py -k ties"),
    Mutant(NEAREST, "rank<Sum>(load(x + lane)) > best", "rank<Sum>(load(x + lane)) >= best", "test_routing.py -k ties"),
    Mutant(NEAREST, "c < Rank(p_.clusters)", "c == c", "test_routing.py -k reference"),
    Mutant(SELECT, "«p_.sequences.ends» ? p_.sequences.ends[", "nullptr", "test_routing_lengths.py -k routes_are"),
    Mutant(NEAREST, "if («sequence < 0») nearest = -1", "false", "test_routing_lengths.py -k nearest"),
    Mutant(NEAREST, "p_.by_sequence && nearest >= 0", "false", "test_routing_lengths.py -k packed_routes"),
    Mutant(GATHERED, "cluster / (g.clusters / g.sequences)", "0", "test_routing_lengths.py -k packed_is_the_reference"),
    Mutant(ROUTES, 'check(«q[i] == k[i]», "shared_qk', "true", "test_routing_lengths.py -k offsets_of_shared"),
    Mutant(ROUTE_ROWS, "end >= 0 && end <= p.length", "end >= 0", "test_routing_lengths.py -k bad_lengths"),
    Mutant(PRODUCTS, "variance + Sum(1e-5)", "variance", "test_routing.py -k constant"),
    Mutant(PRODUCTS, "(v - mean) * (v - mean)", "v * v", "test_routing.py -k update_is"),
    Mutant(CLUSTERS, "(1 - p.decay) * p.members[c]", "p.members[c]", "test_routing.py -k update_is"),
    Mutant(CLUSTERS, "(p.counts[c] + kSmoothing)", "(p.counts[c] + 1)", "test_routing.py -k update_is"),
    Mutant(CLUSTERS, "if («of_row[row] >= 0») ++starts", "true", "test_routing.py -k finite"),
    Mutant(
        CLUSTERS,
        "offset[c + 1] = «offset[c] + count»;",
        "offset[c] + std::int32_t(p.cluster_size)",
        "test_routing.py -k finite",
    ),
    Mutant(CLUSTERS, "0.5 * x", "x", "test_routing.py -k update_is"),
    Mutant(PLACES, "s + gap * (c + 1)", "s + gap * c", "test_routing.py -k gradcheck"),
    Mutant(GATHERED, "start[1] - start[0] == 1", "true", "test_routing.py -k gradcheck"),
    Mutant(
        CLUSTERED, "sequence_.key_row(middle) <= time", "sequence_.key_row(middle) < time", "test_routing.py -k causal"
    ),
    Mutant(ROUTED, "sum[d] /= «Sum(count)»", "Sum(1)", "test_routing.py -k against_float64"),
    Mutant(ROUTED, "p_.head_dim, «Sum(p_.scale)», p_.grad_memory_key", "Sum(1)", "test_routing.py -k gradcheck"),
    Mutant(ROUTED, "offsets[c] + c * g.memory + i", "offsets[c] + i", "test_routing.py -k gradcheck"),
    Mutant(ROUTED, "key[d] *= «Sum(p_.scale)»", "Sum(1)", "test_routing.py -k gradcheck"),
    Mutant(BACKWARD, "if («adds») add_row", "false", "test_routing.py -k long_clusters"),
    Mutant(BACKWARD, "(block + turn) % blocks_of(unit)", "block", "test_routing.py -k long_clusters"),
)
_STAIRCASE = (
    Mutant(ENCODE, "to_float(h) > x", "false", "test_staircase.py -k edges"),
    Mutant(ENCODE, "double(to_float(h)) < x", "false", "test_staircase.py -k edges"),
    Mutant(ENCODE, "cell < 255 ? std::int32_t(cell) : 255", "std::int32_t(cell)", "test_staircase.py -k edges"),
    Mutant(
        DECODE,
        "codes<kBase, kPlanes>(b, f, t, e, v) * 2 + 1",
        "codes<kBase, kPlanes>(b, f, t, e, v) * 2",
        "test_staircase.py -k dequantised",
    ),
    Mutant(
        STATE,
        "refined + full < plane.windows ? refined + full : plane.windows",
        "refined + full",
        "test_staircase.py -k dequantised",
    ),
    Mutant(STATE, "full > 0 ? 1 - state.tail() : state.tail()", "state.tail()", "test_staircase.py -k interrupted"),
    Mutant(STATE, "refined > dropped ? refined - dropped : 0", "refined", "test_staircase.py -k crop"),
    Mutant(
        STATE,
        "length < 0 ? state.length() + length : length",
        "length < 0 ? -length : length",
        "test_staircase.py -k crop",
    ),
    Mutant(LAYOUT, "age > refined(plane)", "age >= refined(plane)", "test_staircase.py -k dequantised"),
    Mutant(
        LAYOUT, "length < residual ? 0 : (length - residual) / window", "length / window", "test_staircase.py -k newest"
    ),
    Mutant(STAIRCASE, "layout.windows_of(before.length()) == windows", "true", "test_staircase.py -k crop"),
    Mutant(
        STAIRCASE,
        "old_tail_ == new_tail_ ? before_.length() : first",
        "before_.length()",
        "test_staircase.py -k dequantised",
    ),
)

_TERMS = (
    Mutant(TERMS, "softcap > 0", "softcap >= 0", "test_logit_terms.py -k bad"),
    Mutant(TERMS, "share >= 0 && share <= 1", "true", "test_logit_terms.py -k bad"),
    Mutant(TERM_TILE, "ds * (1 - t * t)", "ds", "test_logit_terms.py -k definition"),
    Mutant(TERM_TILE, "«(!shares || shares[at] != 0)»;", "true", "test_logit_terms.py -k learned"),
    Mutant(TERM_SUMS, "grad.head_stride == 0 && p.heads_q > 1", "false", "test_logit_terms.py -k many_heads"),
    Mutant(TERM_SUMS, "«last[-i]» = Sum(sum)", "last[i + 1 - count]", "test_distance_bias.py -k block"),
    Mutant(TERM_LOOPS, "panel.head[lane + i] % group * distances(p_)", "0", "test_logit_terms.py -k distance_bias"),
    Mutant(TABLES, "«tables_.index[place + i] == tables_.index[place]»;", "true", "test_disentangled.py -k definition"),
    Mutant(
        TABLES, "«tables_.index[place + i] == tables_.index[place] + i»;", "true", "test_disentangled.py -k definition"
    ),
    Mutant(DISENTANGLED, "number >= 0 && number < numbers", "true", "test_disentangled.py -k operator"),
    Mutant(PANEL, "larger<std::int64_t>(«row[0]», seen.first)", "std::int32_t(0)", "test_row_bounds.py -k beside"),
    Mutant(PANEL, "smaller<std::int64_t>(«row[1]», seen.end)", "row[1] + 1", "test_row_bounds.py -k window"),
    Mutant(PANEL, "«head[lane]» * bounds.head_stride", "head[0]", "test_row_bounds.py -k beside"),
    Mutant(TERMS, "x.size(3) == 2", "true", "test_row_bounds.py -k bad"),
    Mutant(DROPOUT, "«n % 2» - key0", "(n + 1) % 2", "test_logit_terms.py -k definition"),
)
_STATES = (
    Mutant(GATED, "number <= 0", "true", "test_delta_rule.py -k checks_values"),
    Mutant(DELTA, "larger(«kForgets», double", "-__builtin_huge_val()", "test_delta_rule.py -k forgotten"),
    Mutant(DELTA_STEP, "s.beta * (x[v] - «s.decay» * of_key[v])", "1", "test_delta_rule.py -k pieces"),
    Mutant(DELTA_STEP, "«s.decay» * of_query[v]", "1", "test_delta_rule.py -k pieces"),
    Mutant(DELTA_GRADIENTS, "«chunk.gates->whole» * dot(", "1", "test_delta_rule.py -k gradcheck"),
    Mutant(DELTA_GRADIENTS, "grad_sums_[i] -= «chunk.gates->carry» * both;", "0", "test_delta_rule.py -k gradcheck"),
    Mutant(DELTA_GRADIENTS, "factor * (grad[d] - «product * row[d]»)", "0", "test_delta_rule.py -k normalised"),
    Mutant(DELTA, "to_state[i] = «carry» * to_end[i]", "1", "test_delta_rule.py -k carry"),
    Mutant(TRIANGLE, "i = «end - 2»; i >= first", "end - 3", "test_delta_rule.py -k gradcheck"),
    Mutant(STATES, "«pairs[0] *= kDiagonal»;", "pairs[0] *= 1", "test_linear_attention.py -k definition"),
    Mutant(STATES, "Sum sum = «kDiagonal» * pairs[0]", "1", "test_linear_attention.py -k gradcheck"),
    Mutant(STATES_FORWARD, "p_.is_causal && «key == first»", "true", "test_linear_attention.py -k without_a_state"),
    Mutant(
        STATES_FORWARD, "const std::int64_t state = «p_.is_causal» ?", "false", "test_linear_attention.py -k threads"
    ),
    Mutant(STATES_BACKWARD, "«-dot» * factor", "dot", "test_linear_attention.py -k gradcheck"),
    Mutant(STATES_BACKWARD, "states + («p_.is_causal» ? chunk : 0)", "false", "test_linear_attention.py -k threads"),
    Mutant(DELTA_BACKWARD, "x.z, of_head.z + «chunk» * chunk_size()", "0", "test_delta_rule.py -k threads"),
)
_POOLING = (
    Mutant(
        RANGES,
        "i < «smaller(first + kBlock, count)»;",
        "smaller(first + kBlock, count - 1)",
        "test_pooling.py -k blocks",
    ),
    Mutant(RANGES, "off < 0 ? «-off» : off", "off", "test_pooling.py -k blocks"),
    Mutant(RANGES, "smaller(first + p_.block, «p_.length»)", "first + p_.block", "test_pooling.py -k strides"),
    Mutant(RANGES, "batch * «p_.ranges_batch_stride»", "0", "test_pooling.py -k ranges"),
    Mutant(RANGE_CHECKS, "pair[1] <= p.length", "true", "test_pooling.py -k bad"),
    Mutant(RECTIFIED, "«products.abs() > errors»", "errors > products.abs()", "test_rectified.py -k test_blocks"),
    Mutant(RECTIFIED, "1 - «moved.sum(-1, keepdim=True)»", "0", "test_rectified.py -k float64"),
    Mutant(RECTIFIED, "among_blocks < «least»", "least - 1", "test_rectified.py -k dropped"),
    Mutant(RECTIFIED, "«_sizes(video, shares) < BLOCK»", "False", "test_rectified.py -k test_blocks"),
    Mutant(HIERARCHICAL, "ahead + «1» - recent", "2", "test_hierarchical.py -k tokens"),
    Mutant(HIERARCHICAL, "torch.searchsorted(starts.contiguous(), seen) - «1»", "2", "test_hierarchical.py -k tokens"),
    Mutant(HIERARCHICAL, "«left.clamp(min=0)»", "left.abs()", "test_hierarchical.py -k tokens"),
    Mutant(HEADS, "left = «int(self.head_mask.sum())»", "self.num_heads", "test_nn_head_routing.py"),
    Mutant(HEADS, "output * «weights[:, None, :, None]»", "1", "test_nn_head_routing.py -k one_head"),
)
_TANGENTS = (
    Mutant(TANGENTS, "derivative == 0 ? Vec<Sum>{} : derivative * tangent", "derivative * tangent", "test_jvp.py"),
    Mutant(TANGENTS, "sum * Sum(p_.scale) / count", "Vec<Sum>{}", "test_jvp.py -k in_common"),
    Mutant(TANGENTS, "row[d] -= «moves * (sums[lane] * factor)»", "0", "test_jvp.py -k shapes"),
    Mutant(TANGENTS, "«seen.first < tile.first» || seen.first", "false", "test_jvp.py -k shapes"),
    Mutant(
        TANGENT_ROWS,
        "p.moves_logits() ? *from.tangent_logsumexp - tangent_logsumexp : 0",
        "Sum(0)",
        "test_jvp.py -k parts",
    ),
    Mutant(SIGMOID, "derivative = «visible[k] ? derivative : Vec<Sum>{}»", "derivative", "test_jvp.py -k hidden"),
    Mutant(SIGMOID, "derivative = p[k] * «complement» * on_tile.divisor", "Vec<Sum>{} + 1", "test_jvp.py -k shapes"),
    Mutant(JVP, "x->size(1) == of.size(1)", "true", "test_jvp.py -k bad"),
    Mutant(ALONG, "if x not in supported and «not _is_neutral(value)»", "False", "test_jvp.py -k beside"),
    Mutant(
        ALONG,
        "forward_ad._current_level >= 0 or «torch._C._are_functorch_transforms_active()»",
        "False",
        "test_jvp.py -k compiled",
    ),
    Mutant(GRADIENTS, "forward_ad._set_fwd_grad_enabled(«True»)", "False", "test_jvp.py -k second"),
)
MUTANTS = (
    *_INPUT,
    *_FORWARD,
    *_TANGENTS,
    *_BACKWARD,
    *_TERMS,
    *_SPARSE_LINEAR,
    *_STATES,
    *_POOLING,
    *_SAMPLING,
    *_ROUTING,
    *_STAIRCASE,
)
