// A plan leads from a call to launches: it says which mainloop runs, in which tiles, in how many blocks, and where
// partial results lie.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"
#include "cuda/common/mainloop_choice.h"
#include "cuda/reduction/distance_bands.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

// These are a tile's sizes, as far as the host needs them.
struct TileSizes {
  int rows, keys;
  int blocks_per_sm, shared_bytes;  // forward
  int score_warps;                  // backward: warps that each have a row's sums for the gradients of bias and slopes
};

struct Plan {
  Mainloop mainloop = Mainloop::kSm80;
  std::string why_not_sm90;  // on a device that could run it
  int head_dim = 0;          // what it is padded to
  TileSizes tile{};
  Variant variant{};
  std::size_t workspace = 0;
};

struct ForwardPlan : Plan {
  ForwardGeometry geometry{};
  PartialResults partial;
  int* taken = nullptr;    // of sm_90's schedule
  std::int64_t tiles = 0;  // of rows, without splits
};

struct BackwardPlan : Plan {
  BackwardGeometry geometry{};
  BackwardScratch scratch{};
  int* list_order = nullptr;
  // These are sums over the rows of a query head, [batch, heads_q, key]: of the gradients of what is added to logits,
  // without key_mask, and of key_mask. They are null where they are not wanted, and the same where weights are
  // normalised.
  float *added_sums = nullptr, *factor_sums = nullptr;
  DistanceBands bands = {};
  float* distance_sums = nullptr;  // [batch, heads_q, band, sum of the band], likewise
  void* sums = nullptr;            // the part of the workspace that starts at zero
  std::size_t sums_bytes = 0;
};

// Addresses are in this workspace; in one at null they are offsets.
ForwardPlan make_plan(const ForwardParams& params, std::optional<Mainloop> asked, void* workspace);
BackwardPlan make_plan(const BackwardParams& params, std::optional<Mainloop> asked, bool deterministic,
                       void* workspace);

// This is why the backward of a call with terms runs sm_80's loop.
inline constexpr const char* kTermsReason =
    "it has no attn_mask, key_bias, key_mask, row_bounds, tables, softcap or dropout, and the call has one of them";

// sm_90 has loops of every score but this one, as units.cmake says in scores_band_sm90; the reason is for its calls.
constexpr bool has_sm90(Score score) { return score != Score::kSharpenedSoftplus; }
inline constexpr const char* kScoreReason = "it has no kernels of this score";

// This sets what depends on the mainloop. It takes sm_90's where the device has it and nothing speaks against it, else
// sm_80's. `plan_sm90` returns what speaks against it, or nothing. It throws std::runtime_error where sm_90's is asked
// for in vain; `what` is the direction.
template <class Plan, class PlanSm80, class PlanSm90>
void plan_mainloop(const char* what, std::optional<Mainloop> asked, Plan& plan, const PlanSm80& plan_sm80,
                   const PlanSm90& plan_sm90) {
  if (asked == Mainloop::kDecode)
    throw std::runtime_error(std::string("cuda_mainloop: expected a ") + what +
                             " that decode serves, got one without a staircase cache");
  const bool has_sm90 = current_device().major == 9;
  if (asked == Mainloop::kSm90 || (has_sm90 && asked != Mainloop::kSm80)) {
    plan.mainloop = Mainloop::kSm90;
    plan.why_not_sm90 = plan_sm90();
    if (!has_sm90) plan.why_not_sm90 = "it runs on compute capability 9.0 alone";
    if (plan.why_not_sm90.empty()) return;
    if (asked)
      throw std::runtime_error(std::string("cuda_mainloop: expected a ") + what +
                               " that sm90 serves, got one that it does not: " + plan.why_not_sm90);
  }
  plan.mainloop = Mainloop::kSm80;
  plan_sm80();
}

}  // namespace attnx::cuda
