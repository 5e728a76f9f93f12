// These are the launchers of what a staircase cache takes in, gives back and drops. Whatever they depend on is read on
// the device, so that a captured graph replays them at any length.
#pragma once

#include "attnx/params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

void staircase_append(const StaircaseAppendParams& params, const Launch& launch);
void staircase_crop(const StaircaseCropParams& params, const Launch& launch);
void staircase_read(const StaircaseReadParams& params, const Launch& launch);

inline std::size_t staircase_append_workspace(const StaircaseAppendParams&, const Launch&) { return 0; }
inline std::size_t staircase_crop_workspace(const StaircaseCropParams&, const Launch&) { return 0; }
inline std::size_t staircase_read_workspace(const StaircaseReadParams&, const Launch&) { return 0; }

}  // namespace attnx::cuda
