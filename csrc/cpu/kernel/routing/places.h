// The inverse of the clusters of a head: which places in them hold each row, and sums over these places, in the order
// of the clusters whoever adds them up.
#pragma once

#include "../arena.h"
#include "../rows.h"
#include "../units.h"

namespace attnx::cpu::ATTNX_ISA {

struct Places {
  std::int32_t* starts;  // [heads, rows + 1]
  std::int32_t* places;  // [heads, slots]: those of row i from starts[i] on
  const Clusters* clusters;
  std::int64_t rows, slots, count;  // count: clusters of a head

  Places(Arena& arena, const Clusters& c, std::int64_t count, std::int64_t heads)
      : starts(arena.take<std::int32_t>(heads * (c.rows + 1))),
        places(arena.take<std::int32_t>(heads * c.slots)),
        clusters(&c),
        rows(c.rows),
        slots(c.slots),
        count(count) {}

  // Of head `head` of the run, all_head of all; cluster c's places lie `gap` places behind those of the cluster before.
  void fill(std::int64_t head, std::int64_t all_head, std::int64_t gap) const {
    std::int32_t* const start = starts + head * (rows + 1);
    std::int32_t* const place = places + head * slots;
    const std::int32_t* offset = clusters->offsets + all_head * (count + 1);
    const std::int32_t* index = clusters->indices + all_head * slots;
    const std::int64_t used = offset[count];
    __builtin_memset(start, 0, std::size_t(rows + 1) * sizeof *start);
    // start[i + 1] becomes the end of row i when the places are filled in, from the start that it holds before.
    for (std::int64_t s = 0; s < used; ++s)
      if (index[s] + 2 <= rows) ++start[index[s] + 2];
    for (std::int64_t i = 2; i <= rows; ++i) start[i] += start[i - 1];
    for (std::int64_t c = 0; c < count; ++c)
      for (std::int64_t s = offset[c]; s < offset[c + 1]; ++s)
        place[start[index[s] + 1]++] = std::int32_t(s + gap * (c + 1));
  }

  // Adds the rows of from[places][stride] that hold row i of a head to sum[dim].
  template <class Sum>
  std::int64_t add(std::int64_t head, std::int64_t i, const Sum* from, std::int64_t stride, std::int64_t dim,
                   Sum* sum) const {
    const std::int32_t* const start = starts + head * (rows + 1) + i;
    for (std::int64_t n = start[0]; n < start[1]; ++n) {
      const Sum* row = from + places[head * slots + n] * stride;
      for (std::int64_t d = 0; d < dim; ++d) sum[d] += row[d];
    }
    return start[1] - start[0];
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
