// These are the rows that routing compares with centroids, as operators take them.
#pragma once

#include <string_view>

#include "arguments.h"

namespace attnx::ops {

inline constexpr const char* kRouting = "routing_attention";

struct RoutedRows {
  StableTensor query, key, centroids;
  ATTNX_FIELDS(query, key, centroids)
};

// The rows of sequence b may be [leftpad[b], seqused[b]) alone; those of no sequence are in no cluster.
struct RowLengths {
  std::optional<StableTensor> seqused_q, leftpad_q, seqused_k, leftpad_k;
  ATTNX_FIELDS(seqused_q, leftpad_q, seqused_k, leftpad_k)
};
struct LengthsOfRows {
  std::optional<StableTensor> seqused, leftpad;
  ATTNX_FIELDS(seqused, leftpad)
};

// It reads rows and the centroids that they are compared with, which belong to the heads of queries.
RouteParams read_rows(std::string_view name, const StableTensor& rows, const StableTensor& centroids,
                      bool packed = false);
void check_heads(const RoutedRows& x, bool packed = false);
SequenceRows read_lengths(std::string_view seqused_name, const std::optional<StableTensor>& seqused,
                          std::string_view leftpad_name, const std::optional<StableTensor>& leftpad,
                          const RouteParams& params);
// The name is "query" or "key".
SequenceRows read_lengths(std::string_view name, const RowLengths& lengths, const RouteParams& params);

StableTensor empty_ints(const StableTensor& like, const std::vector<std::int64_t>& shape);
StableTensor find_nearest(const RouteParams& route, const StableTensor& rows, bool by_sequence = false);

}  // namespace attnx::ops
