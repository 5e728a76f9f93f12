// This says which mainloop serves calls, where the device has a choice.
#pragma once

#include <optional>

namespace attnx::cuda {

enum class Mainloop { kSm80, kSm90, kDecode };  // kDecode: of few rows over a staircase cache
const char* name_of(Mainloop mainloop);         // "sm80"

// This is the mainloop that is asked for, "sm80", "sm90", "decode" or "auto", by use_mainloop, else by
// ATTNX_CUDA_MAINLOOP. There is none where the fastest may run. It throws std::invalid_argument where the variable has
// another value.
std::optional<Mainloop> asked_mainloop();
const char* asked_mainloop_name();

// The choice holds from now on, in all threads. This throws std::invalid_argument on another name.
void use_mainloop(const char* name);

}  // namespace attnx::cuda
