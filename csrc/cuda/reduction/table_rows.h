// This adds gradients of logits to the rows of a table by distance, each where its pair has its number.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/common/sequence.h"
#include "cuda/logits/table_numbers.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns the table's rows of a tile of queries, or of keys, and walks over
// the tiles that they meet. A warp owns some of these rows, so that sums have one order.
struct TableRows {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = false, kCopiesLate = true;

  struct Parameters {
    Divisor blocks;  // tiles of what is owned, along a head
    bool of_keys;    // the table has rows of keys, not of queries
    DistanceTables tables;
    Tensor sums;
  };

  template <class Tile>
  class Walk {
    int batch_, head_, row_, key_, steps_;
    bool of_keys_;
    Sequence sequence_;

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) : batch_(block), of_keys_(args.reduction.of_keys) {
      const int own = args.reduction.blocks.split(batch_);
      head_ = args.heads.split(batch_);
      sequence_ = sequence_of(args, batch_);
      const Band& band = sequence_.band;
      const auto tiles = [](int rows, int size) { return max((rows + size - 1) / size, 0); };
      if (of_keys_) {
        key_ = own * Tile::kN;
        const Visible queries = band.seen_by(key_, key_ + Tile::kN, sequence_.length_q);
        row_ = queries.first;
        steps_ = tiles(queries.end - row_, Tile::kM);
      } else {
        row_ = own * Tile::kM;
        key_ = band.visible(row_).first / Tile::kN * Tile::kN;  // dropout draws by whole tiles
        steps_ = tiles(band.visible(min(row_ + Tile::kM, sequence_.length_q) - 1).end - key_, Tile::kN);
      }
    }

    __device__ __forceinline__ int end() const { return steps_; }
    __device__ __forceinline__ int begin() const { return 0; }
    __device__ __forceinline__ int next(int step) const { return step + 1; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int step) const { return of_keys_ ? row_ + step * Tile::kM : row_; }
    __device__ __forceinline__ int key(int step) const { return of_keys_ ? key_ : key_ + step * Tile::kN; }
  };

  template <class Tile>
  class Sums {
    static constexpr int kPitch = Tile::kN + 1;  // columns of a tile then lie in different banks, as rows do
    static constexpr int kTogether = 4;          // rows of the table whose numbers are read at once
    static_assert(Tile::kRowWarps == 1 && Tile::kM * kPitch * int(sizeof(float)) <= Tile::kSharedBytes);

    // Neighbouring lanes of one place make up a run. This adds a run up in its first lane, and returns whether the lane
    // is one. `before` is the place of the lane before.
    static __device__ __forceinline__ bool sum_run(float& x, int place, int before) {
      const int lane = threadIdx.x % 32;
      const bool first = lane == 0 || before != place;
      const unsigned firsts = __ballot_sync(~0u, first);
      if (firsts == ~0u) return true;
      const unsigned later = firsts & ~((2u << lane) - 1);
      const int end = later ? __ffs(later) - 1 : 32;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_down_sync(~0u, x, step);
        if (lane + step < end) x += other;
      }
      return first;
    }

   public:
    template <int kM, int kN, class Args>
    __device__ __forceinline__ void add_step(const float (&x)[kM][kN][4], const Args& args, const Walk<Tile>& walk,
                                             int step) const {
      extern __shared__ uint4 shared[];
      float* const tile = reinterpret_cast<float*>(shared);
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      __syncthreads();  // all have read the tiles of rows and keys
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = warp * Tile::kWarpKeys + lane % 4 * 2 + n * 8 + e % 2;
            tile[(lane / 4 + row_of(m * 2 + e / 2)) * kPitch + key] = x[m][n][e];
          }
      __syncthreads();

      const auto& p = args.reduction;
      const Sequence& sequence = walk.sequence(step);
      const int row = walk.row(step), key = walk.key(step), last_key = sequence.band.length_k - 1;
      const int rows = min(Tile::kM, sequence.length_q - row), keys = min(Tile::kN, last_key + 1 - key);
      const int own = p.of_keys ? keys : rows, others = p.of_keys ? rows : keys;
      float* const sums = static_cast<float*>(p.sums.data) + walk.batch(step) * p.sums.batch_stride +
                          walk.head(step) * p.sums.head_stride +
                          std::int64_t(p.of_keys ? key : row) * p.sums.row_stride;
      for (int first_own = warp * kTogether; first_own < own; first_own += Tile::kThreads / 32 * kTogether) {
        for (int first = 0; first < others; first += 32) {
          // A lane past the end takes the last place, and adds nothing there.
          const int other = min(first + lane, others - 1);
          float sum[kTogether], old[kTogether];
          float* to[kTogether];
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const int at = min(first_own + i, own - 1);
            const int of_row = p.of_keys ? other : at, of_key = p.of_keys ? at : other;
            const int place = table_place(p.tables, row + of_row - (key + of_key) + last_key);
            const int before = __shfl_up_sync(~0u, place, 1);
            sum[i] = first + lane < others ? tile[of_row * kPitch + of_key] : 0;
            const bool adds = sum_run(sum[i], place, before) && first_own + i < own;
            to[i] = adds ? sums + at * p.sums.row_stride + place : nullptr;
            // Where places rise, or fall, no two runs have one; else lanes take turns.
            if (!__all_sync(~0u, lane == 0 || place >= before) && !__all_sync(~0u, lane == 0 || place <= before)) {
              for (int turn = 0; turn < 32; ++turn) {
                if (lane == turn && to[i]) *to[i] += sum[i];
                __syncwarp();
              }
              to[i] = nullptr;
            }
          }
#pragma unroll
          for (int i = 0; i < kTogether; ++i) old[i] = to[i] ? *to[i] : 0;
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            if (to[i]) *to[i] = old[i] + sum[i];
          __syncwarp();
        }
      }
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args&, const Walk<Tile>&) const {}
  };
};

}  // namespace attnx::cuda
