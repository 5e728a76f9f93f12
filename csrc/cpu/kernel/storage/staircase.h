// Keys and values of a staircase cache: windows as codes of fewer and fewer bits, and a tail as it came. They are
// unpacked straight into steps: rows of the contraction with the columns on the lanes.
#pragma once

#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

// A block of 32 x 32 codes, its planes, and the ranges of its rows.
struct CodeBlock {
  const std::uint32_t* plane[StaircaseLayout::kMaxPlanes];
  const std::uint16_t* ranges;  // [32][2] float16
};

// How vectors of columns lie in the words of a row: a vector holds whole octets of columns, or half of one.
struct Octets {
  static constexpr int kLanesOf = kLanes<float>;
  static constexpr int kVectors = int(kCodeBlock) / kLanesOf;  // of a row

  static constexpr int octet(int vector) { return vector * kLanesOf / 8; }
  static constexpr int offset(int vector) { return vector * kLanesOf % 8; }  // of the first word

  // What lanes of further octets are shifted by more.
  template <int kBits>
  static ATTNX_INLINE Vec<std::uint32_t> shifts() {
    return lane_numbers<std::uint32_t>() / 8 * kBits;
  }
};

// The codes of a vector of row 8f + 2t + e in the low bits, others above them.
template <int kBits>
ATTNX_INLINE Vec<std::uint32_t> plane_codes(const std::uint32_t* block, int f, int t, int e, int vector) {
  const int k = Octets::octet(vector) + 4 * f;
  const std::uint32_t* const words = block + (k * kBits / 16 * 4 + t) * 8 + Octets::offset(vector);
  return load_eight(words) >> (Octets::shifts<kBits>() + std::uint32_t(16 * e + k * kBits % 16));
}

template <int kBase, int kPlanes>
ATTNX_INLINE Vec<std::uint32_t> codes(const CodeBlock& b, int f, int t, int e, int vector) {
  constexpr auto mask = [](int bits) { return (std::uint32_t(1) << bits) - 1; };
  Vec<std::uint32_t> code = plane_codes<kBase>(b.plane[0], f, t, e, vector) & mask(kBase);
  if constexpr (kPlanes > 1) code = code << kBase | (plane_codes<kBase>(b.plane[1], f, t, e, vector) & mask(kBase));
  if constexpr (kPlanes > 2)
    code = code << 2 * kBase | (plane_codes<2 * kBase>(b.plane[2], f, t, e, vector) & mask(2 * kBase));
  if constexpr (kPlanes > 3)
    code = code << 4 * kBase | (plane_codes<4 * kBase>(b.plane[3], f, t, e, vector) & mask(4 * kBase));
  return code;
}

// The middle of the cell of each code, min + (code + 1/2) step: exact up to the last addition, hence the same bits
// with every instruction set. to[32 / kStep][width][kStep].
template <class A, int kBase, int kPlanes>
inline void unpack_block(const CodeBlock& b, typename A::Element* to, std::int64_t width) {
  constexpr int kBits = kBase << (kPlanes - 1), kStep = A::kStep, kLanesOf = Octets::kLanesOf;
  constexpr bool kLookup = kHasLookup && kBits <= 2;
  float range[2 * kCodeBlock];
  for (int i = 0; i < 2 * kCodeBlock; i += kLanesOf) store(range + i, load_halves(b.ranges + i));
  Vec<float> cell;  // the table of lookup: in units of a step
  for (int i = 0; i < kLanesOf; ++i) cell[i] = float(i % (1 << kBits)) + 0.5f;
  for (int t = 0; t < 4; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      Vec<float> row[2][Octets::kVectors];
#pragma GCC unroll 2
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * f + 2 * t + e;
        const float least = range[2 * r], step = range[2 * r + 1] * float(1 << (8 - kBits));
        [[maybe_unused]] const Vec<float> table = cell * step + least;
#pragma GCC unroll 8
        for (int v = 0; v < Octets::kVectors; ++v) {
          if constexpr (kLookup) {
            row[e][v] = lookup(table, codes<kBase, kPlanes>(b, f, t, e, v));
          } else {
            const auto odd = (Mask<float>)(codes<kBase, kPlanes>(b, f, t, e, v) * 2 + 1);
            row[e][v] = __builtin_convertvector(odd, Vec<float>) * (step * 0.5f) + least;
          }
        }
      }
      typename A::Element* const out = to + (8 * f + 2 * t) / kStep * width * kStep;
#pragma GCC unroll 8
      for (int v = 0; v < Octets::kVectors; ++v) {
        if constexpr (kStep == 2) {
          const Vec<float> pair[2] = {row[0][v], row[1][v]};
          A::store_step(out + v * kLanesOf * kStep, pair);
        } else {
          A::store_row(out + v * kLanesOf, row[0][v]);
          A::store_row(out + width + v * kLanesOf, row[1][v]);
        }
      }
    }
  }
}

// Not inlined: the ten of them would stand in every loop over a cache.
template <class A>
__attribute__((noinline)) void unpack_block(int base, int planes, const CodeBlock& b, typename A::Element* to,
                                            std::int64_t width) {
  switch (base * 8 + planes) {
    case 1 * 8 + 1: return unpack_block<A, 1, 1>(b, to, width);
    case 1 * 8 + 2: return unpack_block<A, 1, 2>(b, to, width);
    case 1 * 8 + 3: return unpack_block<A, 1, 3>(b, to, width);
    case 1 * 8 + 4: return unpack_block<A, 1, 4>(b, to, width);
    case 2 * 8 + 1: return unpack_block<A, 2, 1>(b, to, width);
    case 2 * 8 + 2: return unpack_block<A, 2, 2>(b, to, width);
    case 2 * 8 + 3: return unpack_block<A, 2, 3>(b, to, width);
    case 4 * 8 + 1: return unpack_block<A, 4, 1>(b, to, width);
    case 4 * 8 + 2: return unpack_block<A, 4, 2>(b, to, width);
    default: return unpack_block<A, 8, 1>(b, to, width);
  }
}

template <class Input, class A>
class StaircaseStorage {
 public:
  using Element = typename A::Element;
  using Sequence = ATTNX_ISA::Sequence;
  using Result = Input;
  static constexpr bool kGathered = false, kSteps = true;

  static std::int64_t sequences(const AttentionParams& p) { return p.batch; }

  StaircaseStorage(const AttentionParams& p, const Sequence& s, std::int64_t key_head)
      : StaircaseStorage(*p.cache, s.batch, key_head) {}

  StaircaseStorage(const Staircase& cache, std::int64_t batch, std::int64_t head)
      : layout_(cache.layout),
        state_(cache.of(batch)),
        tail_first_(layout_.windows_of(state_.length()) * layout_.window) {
    for (int which = 0; which < 2; ++which) {
      codes_[which] = cache.codes_of(batch, head, which);
      ranges_[which] = cache.ranges_of(batch, head, which);
      tail_[which] = cache.tail_of<const Input>(batch, head, which, state_.tail());
    }
  }

  // Keys from the given one, a multiple of 32, as steps over features: to[head_dim / kStep][width][kStep], zero in the
  // lanes up to the next multiple of 32.
  void load_key_steps(std::int64_t first, std::int64_t count, Element* to, std::int64_t width) const {
    for (std::int64_t key = first; key < first + count; key += kCodeBlock, to += kCodeBlock * A::kStep) {
      for (std::int64_t d = 0; d < layout_.head_dim; d += kCodeBlock) {
        Element* const block = to + d * width;
        if (key < tail_first_) {
          unpack(kKeyMatrix, key, d, block, width);
        } else {
          load_tail_keys(key, smaller(first + count - key, kCodeBlock), d, block, width);
        }
      }
    }
  }

  // Values as steps over keys: to[count / kStep][width][kStep], the last step padded with zeros.
  void load_value_steps(std::int64_t first, std::int64_t count, Element* to, std::int64_t width) const {
    for (std::int64_t key = first; key < first + count; key += kCodeBlock, to += kCodeBlock * width) {
      if (key >= tail_first_) return load_tail_values(key, first + count - key, to, width);
      for (std::int64_t d = 0; d < layout_.head_dim; d += kCodeBlock)
        unpack(kValueMatrix, key, d, to + d * A::kStep, width);
      if (width == layout_.head_dim) continue;
      for (std::int64_t i = 0; i < kCodeBlock / A::kStep; ++i)
        __builtin_memset(to + (i * width + layout_.head_dim) * A::kStep, 0,
                         std::size_t((width - layout_.head_dim) * A::kStep) * sizeof *to);
    }
  }

  void prefetch(std::int64_t first, std::int64_t count) const {
    if (first + count > tail_first_) return;
    const std::int64_t window = first / layout_.window, token = first % layout_.window;
    for (int which = 0; which < 2; ++which) {
      const std::uint32_t* const words =
          codes_[which] + window * layout_.window_words(0) + layout_.block_offset(0, token, 0);
      const std::int64_t n = count * layout_.head_dim * layout_.plane[0].bits / 32;
      for (std::int64_t i = 0; i < n; i += 16) __builtin_prefetch(words + i, 0, 2);
    }
  }

 private:
  // The block that starts at this key and channel.
  void unpack(int which, std::int64_t key, std::int64_t channel, Element* to, std::int64_t width) const {
    const std::int64_t window = key / layout_.window, token = key % layout_.window;
    CodeBlock b{};
    int planes = 0;
    for (; planes < layout_.planes; ++planes) {
      const std::int64_t slot = state_.slot(layout_, planes, window);
      if (slot < 0) break;
      b.plane[planes] = codes_[which] + layout_.plane[planes].offset + slot * layout_.window_words(planes) +
                        layout_.block_offset(planes, token, channel);
    }
    const bool keys = which == kKeyMatrix;
    const std::int64_t column = keys ? token : channel, row = keys ? channel : token,
                       rows = keys ? layout_.head_dim : layout_.window;
    b.ranges = ranges_[which] + 2 * (window * layout_.window_ranges() + column / layout_.group * rows + row);
    unpack_block<A>(layout_.plane[0].bits, planes, b, to, width);
  }

  void load_tail_keys(std::int64_t key, std::int64_t count, std::int64_t channel, Element* to,
                      std::int64_t width) const {
    Element rows[kCodeBlock * kCodeBlock];
    const Input* const from = tail_[kKeyMatrix] + (key - tail_first_) * layout_.head_dim + channel;
    load_rows<A>([&](std::int64_t i) { return from + i * layout_.head_dim; }, count, kCodeBlock, rows, kCodeBlock);
    __builtin_memset(rows + count * kCodeBlock, 0, std::size_t((kCodeBlock - count) * kCodeBlock) * sizeof *rows);
    for (std::int64_t d = 0; d < kCodeBlock; ++d)
      for (std::int64_t i = 0; i < kCodeBlock; ++i) to[step_index<A>(d, i, width)] = rows[i * kCodeBlock + d];
  }

  void load_tail_values(std::int64_t key, std::int64_t count, Element* to, std::int64_t width) const {
    const Input* const from = tail_[kValueMatrix] + (key - tail_first_) * layout_.head_dim;
    if constexpr (A::kStep == 1) {
      load_rows<A>([&](std::int64_t i) { return from + i * layout_.head_dim; }, count, layout_.head_dim, to, width);
    } else {
      for (std::int64_t i = 0; i < round_up(count, A::kStep); ++i)
        for (std::int64_t d = 0; d < width; ++d)
          to[step_index<A>(i, d, width)] =
              i < count && d < layout_.head_dim ? from[i * layout_.head_dim + d] : Element{};
    }
  }

  const StaircaseLayout& layout_;
  StaircaseState state_;
  std::int64_t tail_first_;
  const std::uint32_t* codes_[2];
  const std::uint16_t* ranges_[2];
  const Input* tail_[2];
};

}  // namespace attnx::cpu::ATTNX_ISA
