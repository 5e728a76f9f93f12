// This sums over the pairs of a query and a key that share a number of what logits get: it makes the gradients of
// attn_mask and block_bias, and the sums of those of numbers by key and by distance.
#pragma once

#include <algorithm>

#include "cuda/common/reduce.h"
#include "cuda/reduction/distance_bands.h"
#include "cuda/reduction/pair_sums.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

// This is the reduction policy of calls with terms. What a thread block owns, and what it walks over, is one of these,
// dense or with lists, and one kernel serves them all:
//   a tile of keys of a query head; the tiles of rows that see it
//   a tile of attn_mask; the sequences and heads that share it
//   a band of distances of a query head; the tiles along its diagonal
//   an entry of a list of keys; the tiles of its block
class TermNumbers {
  static std::int64_t tiles(std::int64_t rows, std::int64_t size) { return (rows + size - 1) / size; }
  static Divisor divisor(std::int64_t tiles) { return Divisor(std::max<std::int64_t>(tiles, 1)); }

 public:
  static constexpr bool kHasBias = true;
  static constexpr bool kKeysStay = false, kRowsStay = false, kCopiesLate = true;

  struct Parameters {
    // The numbers are those of one of these: [batch, heads_q, key]; the mask; [batch, heads_q, band, sum of the band];
    // [batch, heads_q, query block, entry].
    float* by_key = nullptr;
    PairMask mask = {};
    float* by_distance = nullptr;
    double* by_block = nullptr;
    int heads_sharing = 1, places_sharing = 1;    // heads, and (sequence, head), that share a number
    Divisor row_blocks, key_blocks, heads_apart;  // owners along the rows, the keys and the heads
    DistanceBands bands = {};
    BlockList lists, transposed;  // of each block of queries, of keys; null where the call has none
    int block_q, block_k;
    std::int64_t owners;
  };

 private:
  static Parameters owned(const BackwardParams& p, std::int64_t rows, std::int64_t keys, bool one_batch = false,
                          bool one_head = false) {
    const std::int64_t batch = one_batch ? 1 : p.batch, heads = one_head ? 1 : p.heads_q;
    Parameters x;
    x.heads_sharing = one_head ? int(p.heads_q) : 1;
    x.places_sharing = one_batch ? int(p.batch) * x.heads_sharing : x.heads_sharing;
    x.row_blocks = divisor(rows);
    x.key_blocks = divisor(keys);
    x.heads_apart = divisor(heads);
    x.lists = p.key_blocks;
    x.transposed = p.query_blocks;
    x.block_q = int(p.block_q);
    x.block_k = int(p.block_k);
    x.owners = batch * heads * rows * keys;
    return x;
  }

 public:
  template <class Tile>
  static Parameters by_key(const BackwardParams& p, float* sums) {
    Parameters x = owned(p, 1, tiles(p.length_k, Tile::kN));
    x.by_key = sums;
    return x;
  }
  template <class Tile>
  static Parameters of_mask(const BackwardParams& p) {
    const PairMask& mask = p.grad_attn_mask;
    Parameters x = owned(p, tiles(p.length_q, Tile::kM), tiles(p.length_k, Tile::kN), mask.batch_stride == 0,
                         mask.head_stride == 0);
    x.mask = mask;
    return x;
  }
  template <class Tile>
  static Parameters by_distance(const BackwardParams& p, float* sums) {
    const DistanceBands bands(p.length_q, p.length_k, Tile::kM, Tile::kN);
    Parameters x = owned(p, bands.count, 1);
    x.by_distance = sums;
    x.bands = bands;
    return x;
  }
  static Parameters by_block(const BackwardParams& p) {
    Parameters x = owned(p, tiles(p.length_q, p.block_q), p.key_blocks.width);
    x.by_block = p.grad_block_bias;
    return x;
  }

  // This knows the place of the present step alone, because the next one depends on lists.
  template <class Tile>
  class Walk {
    const Parameters& p_;
    Sequence sequence_;                   // that of all steps: sequences that share a mask are equally long
    int own_batch_, own_head_, own_key_;  // of what is shared, the first
    int batch_, head_, row_, key_, key_end_, end_;
    float bias_ = 0;

    // This returns the entry of this block of keys in the list of a block of queries, or -1.
    __device__ __forceinline__ int entry_of(const List& list) const {
      const int block = key_ / p_.block_k, lane = threadIdx.x % 32;
      for (int first = 0; first < list.count(); first += 32) {
        const int own = first + lane;
        const unsigned found = __ballot_sync(~0u, own < list.count() && list.index(own) == block);
        if (found) return first + __ffs(found) - 1;
      }
      return -1;
    }
    __device__ __forceinline__ ListedTiles<Tile::kM> listed_rows() const {
      const int blocks = (sequence_.length_q + p_.block_q - 1) / p_.block_q;
      return {List(p_.transposed, batch_, head_, key_ / p_.block_k), p_.block_q, unsigned(max(blocks - 1, 0))};
    }
    // This goes on to the next tile of the diagonal, or to the next head that shares the numbers, or the first one of
    // the next sequence.
    __device__ __forceinline__ void to_next_place() {
      if (p_.by_distance) {
        row_ += Tile::kN;
        key_ += Tile::kN;
        return;
      }
      if (++head_ < own_head_ + p_.heads_sharing) return;
      head_ = own_head_;
      ++batch_;
    }
    // This finds the place of a step, or of the next one whose tile is listed. It returns which step that is.
    __device__ __forceinline__ int find(int step) {
      if (!p_.lists.counts || p_.by_block || step >= end_) return step;
      if (p_.by_key) {
        const auto listed = listed_rows();
        row_ = listed.first(step);
        bias_ = listed.bias(step);
        return step;
      }
      for (; step < end_; ++step, to_next_place()) {
        const List list(p_.lists, batch_, head_, row_ / p_.block_q);
        const int entry = entry_of(list);
        if (entry < 0) continue;
        bias_ = list.bias(entry);
        break;
      }
      return step;
    }

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) : p_(args.reduction) {
      key_ = p_.key_blocks.split(block) * Tile::kN;
      row_ = p_.row_blocks.split(block) * Tile::kM;
      head_ = own_head_ = p_.heads_apart.split(block);
      batch_ = own_batch_ = block;
      sequence_ = sequence_of(args, batch_);
      const auto tiles = [](int rows, int size) { return max((rows + size - 1) / size, 0); };
      const int length_q = sequence_.length_q, length_k = sequence_.band.length_k;
      if (p_.by_distance) {
        const int offset = p_.bands.offset(row_ / Tile::kM);
        row_ = offset < 0 ? -offset : (Tile::kN - offset % Tile::kN) % Tile::kN;
        key_ = row_ + offset;
        // Whether a row sees a key depends on their distance, so that the first tile tells about all of them.
        const Visible queries = sequence_.band.seen_by(key_, key_ + Tile::kN, length_q);
        const bool seen = queries.first < row_ + Tile::kM && queries.end > row_;
        end_ = seen ? min(tiles(length_q - row_, Tile::kN), tiles(length_k - key_, Tile::kN)) : 0;
      } else if (p_.by_block) {
        const int query_block = row_ / Tile::kM, entry = key_ / Tile::kN;
        const List list(p_.lists, batch_, head_, query_block);
        const bool listed = entry < list.count();
        row_ = query_block * p_.block_q;
        key_ = listed ? list.index(entry) * p_.block_k : length_k;
        key_end_ = min(key_ + p_.block_k, length_k);
        bias_ = listed ? list.bias(entry) : 0;
        end_ = tiles(min(p_.block_q, length_q - row_), Tile::kM) * tiles(key_end_ - key_, Tile::kN);
      } else if (p_.by_key && p_.lists.counts) {
        end_ = listed_rows().end();
      } else {
        const Visible queries = sequence_.band.seen_by(key_, key_ + Tile::kN, length_q);
        if (p_.by_key) {
          row_ = queries.first;
          end_ = tiles(queries.end - row_, Tile::kM);
        } else {
          end_ = queries.first < row_ + Tile::kM && queries.end > row_ ? p_.places_sharing : 0;
        }
      }
      own_key_ = key_;
    }

    __device__ __forceinline__ int own_batch() const { return own_batch_; }
    __device__ __forceinline__ int own_head() const { return own_head_; }

    __device__ __forceinline__ int begin() { return find(0); }
    __device__ __forceinline__ int next(int step) {
      if (p_.by_key) {
        row_ += Tile::kM;
      } else if (!p_.by_block) {
        to_next_place();
      } else if ((key_ += Tile::kN) >= key_end_) {
        key_ = own_key_;
        row_ += Tile::kM;
      }
      return find(step + 1);
    }
    __device__ __forceinline__ int end() const { return end_; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int) const { return row_; }
    __device__ __forceinline__ int key(int) const { return key_; }
    __device__ __forceinline__ float bias(int) const { return bias_; }
  };

  // Warps stand along the keys alone, so that none shares a key with another.
  template <class Tile>
  class Sums : public PairSums<Tile> {
    static_assert(Tile::kRowWarps == 1);
    static constexpr int kRows = Tile::kWarpRows / 8, kKeys = Tile::kWarpKeys / 8;

    __device__ __forceinline__ float of_key(int n, int e) const {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += this->sums_[r / 2][n][r % 2 * 2 + e];
      return sum;
    }

    // The sums of a diagonal of the tile belong to one distance.
    __device__ __forceinline__ void store_distances(float* to) const {
      constexpr int kM = Tile::kM, kN = Tile::kN;
      static_assert(kM + kN <= Tile::kThreads + 1 && kM * kN * int(sizeof(float)) <= Tile::kSharedBytes);
      extern __shared__ uint4 shared[];
      float* const tile = reinterpret_cast<float*>(shared);
      const int lane = threadIdx.x % 32, own_key = threadIdx.x / 32 * Tile::kWarpKeys + lane % 4 * 2;
      __syncthreads();  // all have read the tiles of the last step
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kKeys; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            tile[(lane / 4 + row_of(r)) * kN + own_key + n * 8 + e] = this->sums_[r / 2][n][r % 2 * 2 + e];
      __syncthreads();
      const int own = threadIdx.x;  // the key less the row, plus kM - 1
      if (own >= kM + kN - 1) return;
      const int first = max(kM - 1 - own, 0), end = min(kM - 1 - own + kN, kM);
      float sum = 0;
      for (int row = first; row < end; ++row) sum += tile[row * kN + row + own - (kM - 1)];
      to[own] = sum;
    }

   public:
    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const auto& p = args.reduction;
      const Sequence& sequence = walk.sequence(0);
      const int lane = threadIdx.x % 32;
      const int key = walk.key(0) + threadIdx.x / 32 * Tile::kWarpKeys + lane % 4 * 2;
      if (p.by_block) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeys; ++n) sum += of_key(n, 0) + of_key(n, 1);
        const double of_block = sum_of_block<Tile::kThreads>(sum);
        if (threadIdx.x == 0) p.by_block[blockIdx.x] = of_block;
      } else if (p.by_distance) {
        store_distances(p.by_distance + std::int64_t(blockIdx.x) * p.bands.sums());
      } else if (p.by_key) {
        float* const to = p.by_key + (walk.own_batch() * args.heads_q + walk.own_head()) * args.length_k;
#pragma unroll
        for (int n = 0; n < kKeys; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = sum_of_column(of_key(n, e));
            if (lane / 4 == 0 && key + n * 8 + e < sequence.band.length_k) to[key + n * 8 + e] = sum;
          }
      } else {
        const int row = walk.row(0) + lane / 4;
        float* const to = static_cast<float*>(const_cast<void*>(p.mask.data)) + walk.own_batch() * p.mask.batch_stride +
                          walk.own_head() * p.mask.head_stride;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row + row_of(r) >= sequence.length_q) break;
          float* const of_row = to + (row + row_of(r)) * p.mask.row_stride;
#pragma unroll
          for (int n = 0; n < kKeys; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (key + n * 8 + e < sequence.band.length_k)
                of_row[(key + n * 8 + e) * p.mask.key_stride] = this->sums_[r / 2][n][r % 2 * 2 + e];
        }
      }
    }
  };
};

}  // namespace attnx::cuda
