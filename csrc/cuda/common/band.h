// A band says which keys a query sees under a dense, causal or window mask: those about its own position.
#pragma once

#include <cuda_runtime.h>

namespace attnx::cuda {

// These are the keys [first, end) that a query sees.
struct Visible {
  int first, end;
};

struct Band {
  int length_k;
  int offset;       // of the key where a query stands: length_k - length_q where the last meets the last
  int left, right;  // how far a query sees; at most 2^30

  __device__ __forceinline__ Visible visible(int query) const {
    return {max(query + offset - left, 0), min(query + offset + right + 1, length_k)};
  }
  // These are the queries of length_q that see one of the keys [first, end).
  __device__ __forceinline__ Visible seen_by(int first, int end, int length_q) const {
    return {max(first - offset - right, 0), min(end - offset + left, length_q)};
  }
  // These are the keys that every query in [first_query, last_query] sees.
  __device__ __forceinline__ Visible seen_by_all(int first_query, int last_query) const {
    return {visible(last_query).first, visible(first_query).end};
  }
};

}  // namespace attnx::cuda
