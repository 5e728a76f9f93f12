// The backward loop. For a tile of query rows: every tile of keys once, for each panel of the rows
//
//     S^T = K Q^T    dP^T = V dO^T    P, dS = Score'(S, dP)    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
//
// The weights are computed again from queries and keys; nothing of size length_q x length_k is kept. A unit of work
// owns its query rows and with them dQ. dK and dV are summed in float32 over the whole length of the keys, one such
// sum a worker; where there are fewer heads than threads the query tiles of a head are dealt to several units, whose
// sums are added up at the end in a fixed order. So results do not depend on who ran first.
#pragma once

#include "../executor.h"
#include "arena.h"
#include "gemm.h"
#include "rows.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kBackwardKeys = 96;  // a tile; a multiple of kRowMultiple

template <class Input, class Score, class Tiles, template <class, class> class Storage>
class Backward {
  using A = Arithmetic<Input>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using Source = Storage<Input, A>;
  using Sequence = typename Source::Sequence;
  using Result = typename Source::Result;
  using ScoreState = typename Score::template Backward<A>;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static constexpr int kMaxPanels = 4;
  static_assert(kBackwardKeys % kRowMultiple == 0 && kBackwardKeys % A::kStep == 0);

 public:
  Backward(const BackwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        group_(p.heads_q / p.heads_k),
        head_stride_(row_stride(p.head_dim)),
        value_stride_(row_stride(p.value_dim)),
        head_lanes_(round_up(p.head_dim, kLanes<Sum>)),
        value_lanes_(round_up(p.value_dim, kLanes<Sum>)),
        rows_(p, Tiles::kListed, Source::kGathered, larger(p.head_dim, p.value_dim) > 128 ? 1 : kMaxPanels) {
    if (Source::kGathered) return;
    // The fewest splits that keep nine tenths of the threads' time busy.
    const std::int64_t heads = units(), threads = executor.threads;
    while (splits_ < threads && heads * splits_ * 10 < round_up(heads * splits_, threads) * 9) ++splits_;
  }

  std::int64_t workspace_bytes() const {
    // A cluster's sums stay its own: each worker keeps but those of its heads.
    const std::int64_t sums = splits_ == 1 ? executor_.threads : units();
    return executor_.threads * worker_bytes() + sums * sums_bytes();
  }

  void run(char* workspace) const {
    char* const all_sums = workspace + executor_.threads * worker_bytes();
    std::int64_t next = 0;
    executor_.run([&](int worker) {
      Buffers buffers(*this, workspace + worker * worker_bytes());
      for (;;) {
        const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (unit >= units()) return;
        char* const sums = all_sums + (splits_ == 1 ? worker : unit) * sums_bytes();
        differentiate(unit / splits_, unit % splits_, sums, buffers);
        if constexpr (!Source::kGathered)
          if (splits_ == 1) finish(unit, 0, sums);
      }
    });
    if constexpr (!Source::kGathered) {
      if (splits_ == 1) return;
      next = 0;
      executor_.run([&](int) {
        for (;;) {
          const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
          if (unit >= units()) return;
          finish(unit / splits_, unit % splits_, all_sums + unit / splits_ * splits_ * sums_bytes());
        }
      });
    }
  }

 private:
  // What one panel of rows holds through the loop over the keys.
  struct Rows {
    Panel<Sum>* panel;
    ScoreState* score;
    Element *query, *grad;            // transposed, steps over features
    Element *query_rows, *grad_rows;  // steps over rows
    Sum* grad_query;                  // transposed
    double *grad_bias, *grad_slope;   // per lane
  };

  struct Buffers {
    Element *keys, *keys_by_step, *values, *rows, *weights, *grads, *grads_by_step;
    Sum *products, *grad_weights;
    Rows panel[kMaxPanels];
    std::int64_t bytes;

    Buffers(const Backward& f, char* block) {
      constexpr bool kPlain = A::kStep == 1;  // an operand reads the same by row and by step
      Arena arena(block);
      keys = arena.take<Element>(f.tile_keys() * f.head_stride_);
      keys_by_step = kPlain ? keys : arena.take<Element>(f.tile_keys() * f.head_stride_);
      values = arena.take<Element>(f.tile_keys() * f.value_stride_);
      rows = arena.take<Element>(kWidth * larger(f.head_stride_, f.value_stride_));
      products = arena.take<Sum>(f.tile_keys() * kWidth);
      grad_weights = arena.take<Sum>(f.tile_keys() * kWidth);
      weights = arena.take<Element>(f.tile_keys() * kWidth);
      grads = arena.take<Element>(f.tile_keys() * kWidth);
      grads_by_step = kPlain ? grads : arena.take<Element>(f.tile_keys() * kWidth);
      for (int i = 0; i < f.rows_.panels; ++i) {
        panel[i].panel = arena.take<Panel<Sum>>(1);
        panel[i].score = arena.take<ScoreState>(1);
        panel[i].query = arena.take<Element>(f.head_stride_ * kWidth);
        panel[i].grad = arena.take<Element>(f.value_stride_ * kWidth);
        panel[i].query_rows = arena.take<Element>(f.head_lanes_ * kWidth);
        panel[i].grad_rows = arena.take<Element>(f.value_lanes_ * kWidth);
        panel[i].grad_query = arena.take<Sum>(f.head_stride_ * kWidth);
        panel[i].grad_bias = arena.take<double>(kWidth);
        panel[i].grad_slope = arena.take<double>(kWidth);
      }
      bytes = arena.used();
    }
  };

  // What a unit sums over its query rows.
  struct Sums {
    Sum *grad_key, *grad_value;                  // [length_k rounded up][lanes]
    double *grad_bias, *grad_slope, *grad_sink;  // [group]
    std::int64_t bytes;

    Sums(const Backward& f, char* block) {
      Arena arena(block);
      const std::int64_t keys = Source::kGathered ? 0 : f.p_.length_k;
      grad_key = arena.take<Sum>(keys * f.head_lanes_);
      grad_value = arena.take<Sum>(keys * f.value_lanes_);
      grad_bias = arena.take<double>(f.group_);
      grad_slope = arena.take<double>(f.group_);
      grad_sink = arena.take<double>(f.group_);
      bytes = arena.used();
    }
  };

  // Wide enough for blocks of rows (as an A operand contracted over rows) and for vectors (as a B operand).
  static std::int64_t row_stride(std::int64_t dim) {
    return larger(round_up(dim, kRowMultiple), round_up(dim, kLanes<Sum>));
  }
  // Of a tile. Clusters that are not long have all of theirs in one.
  std::int64_t tile_keys() const {
    constexpr std::int64_t kMostAtOnce = 2 * kBackwardKeys;
    if (!Source::kGathered || p_.length_k > kMostAtOnce) return kBackwardKeys;
    return round_up(larger<std::int64_t>(p_.length_k, 1), kRowMultiple);
  }
  bool needs_output_of_cluster() const { return Source::kGathered && Score::kNormalised && !p_.output.data; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }
  std::int64_t sums_bytes() const { return Sums(*this, nullptr).bytes; }
  // Key heads of a sequence, and query heads of one of them; a cluster is about one head.
  std::int64_t key_heads() const { return Source::kGathered ? 1 : p_.heads_k; }
  std::int64_t query_heads() const { return Source::kGathered ? 1 : group_; }
  std::int64_t units() const { return Source::sequences(p_) * key_heads() * splits_; }

  void differentiate(std::int64_t unit, std::int64_t split, char* memory, Buffers& b) const {
    const Sequence sequence(p_, unit / key_heads());
    const std::int64_t key_head = sequence.first_head / group_ + unit % key_heads();
    const std::int64_t head0 = Source::kGathered ? sequence.first_head : key_head * group_;
    const Source storage(p_, sequence, key_head);
    Sums sums(*this, memory);
    __builtin_memset(memory, 0, std::size_t(sums.bytes));
    if constexpr (Source::kGathered) {
      sums.grad_key = static_cast<Sum*>(p_.key_sums) + sequence.first_key_sum * head_lanes_;
      sums.grad_value = static_cast<Sum*>(p_.value_sums) + sequence.first_key_sum * value_lanes_;
      __builtin_memset(sums.grad_key, 0, std::size_t(sequence.length_k * head_lanes_) * sizeof(Sum));
      __builtin_memset(sums.grad_value, 0, std::size_t(sequence.length_k * value_lanes_) * sizeof(Sum));
    }
    // A split takes every splits_-th tile of the rows of the key head's query heads.
    const std::int64_t rows = sequence.length_q * rows_.group;
    const std::int64_t tiles = (rows + rows_.tile_rows - 1) / rows_.tile_rows;
    for (std::int64_t i = split; i < tiles * (query_heads() / rows_.group); i += splits_) {
      const std::int64_t first_head = head0 + i / tiles * rows_.group, row0 = i % tiles * rows_.tile_rows;
      differentiate_rows(sequence, storage, first_head, row0, smaller(rows, row0 + rows_.tile_rows), sums, b);
    }
    if constexpr (Source::kGathered)
      if (p_.grad_sink) p_.grad_sink[unit] = sums.grad_sink[head0 % group_];
  }

  void differentiate_rows(const Sequence& sequence, const Source& storage, std::int64_t first_head, std::int64_t row0,
                          std::int64_t end, const Sums& sums, Buffers& b) const {
    const Tiles tiles(p_, sequence, first_head, row0);
    int panels = 0;
    KeyRange any{sequence.length_k, 0};
    for (std::int64_t row = row0; row < end; row += rows_.panel_rows, ++panels) {
      Rows& r = b.panel[panels];
      r.panel->set(p_, sequence, tiles, first_head, rows_.group, row, smaller(end - row, rows_.panel_rows));
      any = {smaller(any.first, r.panel->any.first), larger(any.end, r.panel->any.end)};
      begin(sequence, r, b.rows);
    }
    const auto for_each_tile = [&](auto visit) {
      tiles.for_each(any, tile_keys(), [&](const KeyTile& tile) {
        storage.load_keys(tile.first, tile.count, b.keys, head_stride_);
        storage.load_values(tile.first, tile.count, b.values, value_stride_);
        storage.prefetch(tile.next, tile_keys());
        if constexpr (A::kStep > 1) interleave_rows<A>(b.keys, tile.count, head_stride_, b.keys_by_step, head_stride_);
        for (int i = 0; i < panels; ++i) {
          const KeyRange seen = b.panel[i].panel->any;
          if (seen.first < tile.first + tile.count && seen.end > tile.first) visit(b.panel[i], tile);
        }
      });
    };
    // The output of one cluster alone is not kept. What its rows need of it comes from the products of one tile, or
    // else from those of all, which are then made twice.
    const bool needs_output = needs_output_of_cluster(), at_once = any.end <= tile_keys();
    if (needs_output && !at_once) {
      for_each_tile([&](Rows& r, const KeyTile& tile) {
        const std::int64_t padded = round_up(tile.count, A::kStep);
        multiply(b, r, padded);
        add_products(b, r, PanelOnTile<Sum>(*r.panel, tile, padded), padded);
      });
    }
    for_each_tile([&](Rows& r, const KeyTile& tile) { visit(sums, b, r, tile, needs_output && at_once); });
    for (int i = 0; i < panels; ++i) store_rows(sequence, sums, b.panel[i]);
  }

  void begin(const Sequence& s, Rows& r, Element* rows) const {
    const Panel<Sum>& panel = *r.panel;
    const auto fetch = [&](const Tensor& from, std::int64_t dim, std::int64_t stride, std::int64_t lanes,
                           Element* transposed, Element* by_step) {
      load_rows<A>(
          [&](std::int64_t i) {
            return row_of<const Input>(from, s.batch, panel.head[i], s.query_row(panel.query[i]));
          },
          panel.rows, dim, rows, stride);
      // A mean over several clusters gives each its share of the gradient.
      if constexpr (Source::kGathered)
        if (&from == &p_.grad_output)
          for (std::int64_t i = 0; i < panel.rows; ++i) s.take_share(panel.query[i], rows + i * stride, dim);
      transpose_rows<A>(rows, panel.rows, dim, stride, transposed);
      interleave_rows<A>(rows, panel.rows, stride, by_step, lanes);
    };
    fetch(p_.query, p_.head_dim, head_stride_, head_lanes_, r.query, r.query_rows);
    fetch(p_.grad_output, p_.value_dim, value_stride_, value_lanes_, r.grad, r.grad_rows);
    __builtin_memset(r.grad_query, 0, std::size_t(head_stride_ * kWidth) * sizeof(Sum));
    __builtin_memset(r.grad_bias, 0, kWidth * sizeof(double));
    __builtin_memset(r.grad_slope, 0, kWidth * sizeof(double));
    r.score->template begin<Input>(p_, s, panel);
  }

  // S and dP of one tile.
  void multiply(Buffers& b, const Rows& r, std::int64_t keys) const {
    constexpr int kStep = A::kStep;
    gemm<A>({b.keys, head_stride_, kStep, r.query, kWidth * kStep, b.products, kWidth}, keys, r.panel->vectors,
            (p_.head_dim + kStep - 1) / kStep, false);
    gemm<A>({b.values, value_stride_, kStep, r.grad, kWidth * kStep, b.grad_weights, kWidth}, keys, r.panel->vectors,
            (p_.value_dim + kStep - 1) / kStep, false);
  }

  void add_products(Buffers& b, Rows& r, const PanelOnTile<Sum>& on_tile, std::int64_t keys) const {
    if constexpr (Source::kGathered && Score::kNormalised) {
      for (int v = 0; v < r.panel->vectors; ++v) {
        const int lane = v * kLanes<Sum>;
        Vec<Sum> sum = {};
        for_each_logit<A>(b.products, keys, Sum(p_.scale), *r.panel, on_tile, v,
                          [&](auto key, auto& x, auto& visible, auto masked) {
                            for (int k = 0; k < A::kStep; ++k) {
                              const Vec<Sum> dp = load(b.grad_weights + (key + k) * kWidth + lane);
                              const Vec<Sum> product = r.score->weight(x[k], lane) * dp;
                              if constexpr (masked.kValue) {
                                sum += visible[k] ? product : Vec<Sum>{};
                              } else {
                                sum += product;
                              }
                            }
                          });
        r.score->add_products(lane, sum);
      }
    }
  }

  void visit(const Sums& sums, Buffers& b, Rows& r, const KeyTile& tile, bool needs_output) const {
    constexpr int kStep = A::kStep;
    const std::int64_t key0 = tile.first, keys = tile.count;
    const Panel<Sum>& panel = *r.panel;
    const std::int64_t padded = round_up(keys, kStep);
    const PanelOnTile<Sum> on_tile(panel, tile, padded);
    multiply(b, r, padded);
    if (needs_output) add_products(b, r, on_tile, padded);
    for (int v = 0; v < panel.vectors; ++v) weigh(b, r, on_tile, padded, v);

    // Hidden pairs have weights of zero, which is enough unless they would meet a NaN or an infinity.
    const auto add = [&](const Element* other, std::int64_t count, const GemmOperands<A>& g, std::int64_t rows,
                         std::int64_t lanes, std::int64_t products, auto sees) {
      if (!on_tile.masked || all_finite(other, count)) {
        gemm<A>(g, rows, (lanes + kLanes<Sum> - 1) / kLanes<Sum>, (products + kStep - 1) / kStep, true);
      } else {
        gemm_where<A>(g, rows, lanes, products, sees);
      }
    };
    const auto visible = [&](std::int64_t lane, std::int64_t key) {
      return key0 + key >= panel.visible[lane].first && key0 + key < panel.visible[lane].end;
    };
    const auto key_by_lane = [&](std::int64_t key, std::int64_t, std::int64_t lane) { return visible(lane, key); };
    const auto lane_by_key = [&](std::int64_t, std::int64_t lane, std::int64_t key) { return visible(lane, key); };
    add(r.grad_rows, round_up(panel.rows, kStep) * value_lanes_,
        {b.weights, kWidth, kStep, r.grad_rows, value_lanes_ * kStep, sums.grad_value + key0 * value_lanes_,
         value_lanes_},
        keys, p_.value_dim, panel.rows, key_by_lane);
    add(r.query_rows, round_up(panel.rows, kStep) * head_lanes_,
        {b.grads, kWidth, kStep, r.query_rows, head_lanes_ * kStep, sums.grad_key + key0 * head_lanes_, head_lanes_},
        keys, p_.head_dim, panel.rows, key_by_lane);
    add(b.keys, keys * head_stride_,
        {b.keys_by_step, kStep, head_stride_ * kStep, b.grads_by_step, kWidth * kStep, r.grad_query, kWidth},
        p_.head_dim, panel.rows, keys, lane_by_key);
  }

  void weigh(Buffers& b, Rows& r, const PanelOnTile<Sum>& on_tile, std::int64_t keys, int v) const {
    const int lane = v * kLanes<Sum>;
    const ScoreState score = *r.score;
    const Vec<Sum> position = load(on_tile.position + lane);
    Vec<Sum> bias = {}, slope = {};
    for_each_logit<A>(b.products, keys, Sum(p_.scale), *r.panel, on_tile, v,
                      [&](auto key, auto& x, auto& visible, auto masked) {
                        Vec<Sum> ds[A::kStep];
                        for (int k = 0; k < A::kStep; ++k) {
                          Vec<Sum> p;
                          const std::int64_t row = (key + k) * kWidth + lane;
                          score.differentiate(x[k], load(b.grad_weights + row), lane, on_tile, p, ds[k]);
                          if constexpr (masked.kValue) {
                            p = visible[k] ? p : Vec<Sum>{};
                            ds[k] = visible[k] ? ds[k] : Vec<Sum>{};
                          }
                          A::store_row(b.weights + row, p);
                          A::store_row(b.grads + row, ds[k]);
                          bias += ds[k];
                          if (r.panel->alibi) slope += ds[k] * absolute(position - Sum(key + k));
                        }
                        if constexpr (A::kStep > 1)
                          A::store_step(b.grads_by_step + step_index<A>(key, lane, kWidth), ds);
                      });
    for (int i = 0; i < kLanes<Sum>; ++i) {
      r.grad_bias[lane + i] += double(bias[i]);
      r.grad_slope[lane + i] -= double(slope[i]);
    }
  }

  void store_rows(const Sequence& s, const Sums& sums, const Rows& r) const {
    for (int lane = 0; lane < r.panel->rows; ++lane) {
      const std::int64_t head = r.panel->head[lane];
      store_lane(r.grad_query, lane, p_.head_dim, Sum(p_.scale),
                 row_of<Result>(p_.grad_query, s.batch, head, s.result_row(r.panel->query[lane])));
      sums.grad_bias[head % group_] += r.grad_bias[lane];
      sums.grad_slope[head % group_] += r.grad_slope[lane];
      if constexpr (Score::kNormalised)
        if (p_.grad_sink) sums.grad_sink[head % group_] += r.score->grad_sink(lane);
    }
  }

  // Adds up the sums of the splits of a head and stores them; each part of splits_ does its share of the keys. Not for
  // clusters, whose sums are scattered afterwards.
  void finish(std::int64_t head, std::int64_t part, char* sums) const {
    const std::int64_t key_head = head % p_.heads_k;
    const Sequence s(p_, head / p_.heads_k);
    const auto add_up = [&](auto pick, std::int64_t n, Sum* to) {
      for (std::int64_t i = 0; i < n; ++i) to[i] = 0;
      for (std::int64_t split = 0; split < splits_; ++split) {
        const Sum* from = pick(Sums(*this, sums + split * sums_bytes()));
        for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
      }
    };
    Sum row[kMaxHeadDim];
    for (std::int64_t key = s.length_k * part / splits_; key < s.length_k * (part + 1) / splits_; ++key) {
      add_up([&](const Sums& x) { return x.grad_key + key * head_lanes_; }, p_.head_dim, row);
      for (std::int64_t d = 0; d < p_.head_dim; ++d) row[d] *= Sum(p_.scale);
      convert_row(row_of<Input>(p_.grad_key, s.batch, key_head, s.first_k + key), row, p_.head_dim);
      add_up([&](const Sums& x) { return x.grad_value + key * value_lanes_; }, p_.value_dim, row);
      convert_row(row_of<Input>(p_.grad_value, s.batch, key_head, s.first_k + key), row, p_.value_dim);
    }
    if (part != 0) return;
    const auto store_heads = [&](auto pick, double* to) {
      if (!to) return;
      for (std::int64_t g = 0; g < group_; ++g) {
        double sum = 0;
        for (std::int64_t split = 0; split < splits_; ++split) sum += pick(Sums(*this, sums + split * sums_bytes()))[g];
        to[s.batch * p_.heads_q + key_head * group_ + g] = sum;
      }
    };
    store_heads([](const Sums& x) { return x.grad_bias; }, p_.grad_bias);
    store_heads([](const Sums& x) { return x.grad_slope; }, p_.grad_alibi_slopes);
    store_heads([](const Sums& x) { return x.grad_sink; }, p_.grad_sink);
  }

  const BackwardParams& p_;
  const Executor& executor_;
  std::int64_t group_;
  std::int64_t head_stride_, value_stride_, head_lanes_, value_lanes_;
  RowTiling<Sum> rows_;
  std::int64_t splits_ = 1;  // of a head's query tiles
};

}  // namespace attnx::cpu::ATTNX_ISA
