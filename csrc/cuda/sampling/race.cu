#include "race.h"

#include <math_constants.h>

#include <climits>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kWarps = 4, kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kKept = 1024;                          // candidates of a row whose times are kept in shared memory
constexpr std::uint64_t kNever = ~std::uint64_t(0);  // of a block that does not run; no time has these bits

}  // namespace

// A warp finds the finish of a row by radix selection: the bits of the times, which are not negative, order as the
// times do. In rows of more candidates than shared memory has room for, the times are drawn anew for each digit.
__global__ void __launch_bounds__(kWarps * 32)
    attnx_race(const __grid_constant__ Round round, const __grid_constant__ SampledLists lists, int blocks_per_row) {
  __shared__ int counts[kWarps][kDigits];
  __shared__ std::uint64_t kept_times[kWarps][kKept];
  const int lane = threadIdx.x % 32, rows = int(round.grid.query_blocks());
  const std::int64_t number = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (number >= round.heads * rows) return;
  const std::int64_t head = number / rows;
  const int i = int(number - head * rows);
  const BlockRow<int> row(round.grid_of(round.own_lengths(head)), i);
  const SamplingRound draws = round.draws();
  int* const histogram = counts[threadIdx.x / 32];
  std::uint64_t* const times = kept_times[threadIdx.x / 32];

  // These return the bits of the time of candidate j, which a lane always asks for itself.
  const auto drawn_time = [&](int j) {
    const int distance = row.distance(j);
    const float p = __ldg(round.keep + distance);
    return distance > 0 && p > 0 ? std::uint64_t(__double_as_longlong(arrival_time(draws.draw(head, i, j), p)))
                                 : kNever;
  };
  const auto time_of = [&](int j) {
    if (j >= row.candidates) return kNever;
    return j < kKept ? times[j] : drawn_time(j);
  };
  for (int j = lane; j < min(row.candidates, kKept); j += 32) times[j] = drawn_time(j);

  // This calls visit(block, bits of its time) for 32 blocks at a time.
  const auto for_each = [&](const auto& visit) {
    for (int first = 0; first < row.candidates; first += 32) visit(first + lane, time_of(first + lane));
  };

  int wanted = blocks_per_row - (row.diagonal_end - row.diagonal_begin);
  std::uint64_t time = 0;  // of the finish, as far as it is known
  Finish finish{wanted > 0 ? CUDART_INF : -1.0,
                INT_MAX};  // all times are before the former, and none before the latter
  bool found = wanted <= 0;
  for (int shift = 64 - kDigitBits; shift >= 0 && !found; shift -= kDigitBits) {
    for (int d = lane; d < kDigits; d += 32) histogram[d] = 0;
    __syncwarp();
    for_each([&](int, std::uint64_t bits) {
      const bool fits = shift == 64 - kDigitBits || (bits ^ time) >> (shift + kDigitBits) == 0;
      if (bits != kNever && fits) atomicAdd(histogram + int(bits >> shift & (kDigits - 1)), 1);
    });
    __syncwarp();
    // Each lane has neighbouring digits, and one finds the digit at which the number of blocks is reached.
    constexpr int kOwn = kDigits / 32;
    int own = 0;
    for (int d = lane * kOwn; d < (lane + 1) * kOwn; ++d) own += histogram[d];
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += before;
    }
    const unsigned reached = __ballot_sync(~0u, sum >= wanted);
    if (reached == 0) {  // all are kept
      found = true;
    } else {
      int digit = lane * kOwn, left = wanted - (sum - own);
      while (digit < (lane + 1) * kOwn - 1 && left > histogram[digit]) left -= histogram[digit++];
      const int lane_found = __ffs(reached) - 1;
      const bool whole = __shfl_sync(~0u, left == histogram[digit], lane_found);
      wanted = __shfl_sync(~0u, left, lane_found);
      time |= std::uint64_t(__shfl_sync(~0u, digit, lane_found)) << shift;
      if (whole) {  // the digit's blocks are kept, whatever their further digits
        finish.time = __longlong_as_double(time | ((std::uint64_t(1) << shift) - 1));
        found = true;
      }
    }
    __syncwarp();
  }
  if (!found) {  // of the blocks that arrive at this time, the first ones are kept
    finish.time = __longlong_as_double(time);
    for_each([&](int j, std::uint64_t bits) {
      const unsigned ties = __ballot_sync(~0u, bits == time);
      const int place = __popc(ties & ((1u << lane) - 1)) + 1;
      const unsigned last = __ballot_sync(~0u, bits == time && place == wanted);
      if (last) finish.last = __shfl_sync(~0u, j, __ffs(last) - 1);
      wanted -= __popc(ties);
    });
  }
  if (lane == 0) round.finishes[number] = finish;
  lists.write(number, 0, int(round.grid.key_blocks()), [&](int j, float& p) {
    if (j >= row.candidates) return false;
    const int distance = row.distance(j);
    if (lists.corrections) p = __ldg(round.keep + distance);
    const std::uint64_t bits = time_of(j);
    return distance == 0 || (bits != kNever && finish.takes(__longlong_as_double(bits), j));
  });
}

void launch_race(const Round& round, std::int64_t blocks_per_row, const SampledLists& lists, cudaStream_t stream) {
  const int wanted = blocks_per_row < INT_MAX ? int(blocks_per_row) : INT_MAX;
  launch_kernel("attnx_race", attnx_race, (round.heads * round.grid.query_blocks() + kWarps - 1) / kWarps, kWarps * 32,
                0, stream, round, lists, wanted);
}

}  // namespace attnx::cuda
