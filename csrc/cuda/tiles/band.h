// Tiles of keys under a band: dense, causal and window masks, which differ in two numbers only.
#pragma once

#include <cstdint>

namespace attnx::cuda {

// The keys [first, end) that a query sees.
struct Visible {
  int first, end;
};

struct Band {
  int length_k;
  int offset;       // length_k - length_q: the last query meets the last key
  int left, right;  // how far a query sees; at most 2^30

  __device__ __forceinline__ Visible visible(int query) const {
    return {max(query + offset - left, 0), min(query + offset + right + 1, length_k)};
  }
  // The queries of length_q that see one of the keys [first, end).
  __device__ __forceinline__ Visible seen_by(int first, int end, int length_q) const {
    return {max(first - offset - right, 0), min(end - offset + left, length_q)};
  }
  // The keys that every query in [first_query, last_query] sees.
  __device__ __forceinline__ Visible seen_by_all(int first_query, int last_query) const {
    return {visible(last_query).first, visible(first_query).end};
  }
};

// The tiles of kKeys keys that some query in [first_query, last_query] sees, or one split's share of them.
template <int kKeys>
class BandTiles {
  int begin_, end_;

 public:
  static constexpr bool kHasBias = false;

  __device__ __forceinline__ BandTiles(const Band& band, int first_query, int last_query, int split, int splits) {
    const int begin = band.visible(first_query).first / kKeys;
    const int end = max((max(band.visible(last_query).end, 0) + kKeys - 1) / kKeys, begin);
    const int share = (end - begin + splits - 1) / splits;
    begin_ = min(begin + split * share, end);
    end_ = min(begin_ + share, end);
  }

  // The tiles are numbered [begin, end).
  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }
  __device__ __forceinline__ int key(int tile) const { return tile * kKeys; }
  __device__ __forceinline__ float bias(int) const { return 0; }
};

}  // namespace attnx::cuda
