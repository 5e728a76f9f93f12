#include "mainloop_choice.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace attnx::cuda {

const char* name_of(Mainloop mainloop) {
  switch (mainloop) {
    case Mainloop::kSm80: return "sm80";
    case Mainloop::kSm90: return "sm90";
    default: return "decode";
  }
}

namespace {

using Asked = std::optional<Mainloop>;

Asked parse(const std::string& what, const std::string& name) {
  if (name == "auto") return std::nullopt;
  for (const Mainloop mainloop : {Mainloop::kSm80, Mainloop::kSm90, Mainloop::kDecode})
    if (name == name_of(mainloop)) return mainloop;
  throw std::invalid_argument(what + ": expected auto, sm80, sm90 or decode, got " + name);
}

// The choice is process-wide because autograd runs backwards in threads of its own.
std::atomic<Asked>& asked() {
  static std::atomic<Asked> value = [] {
    const char* name = std::getenv("ATTNX_CUDA_MAINLOOP");
    return parse("ATTNX_CUDA_MAINLOOP", name ? name : "auto");
  }();
  return value;
}

}  // namespace

std::optional<Mainloop> asked_mainloop() { return asked(); }

const char* asked_mainloop_name() {
  const Asked value = asked();
  return value ? name_of(*value) : "auto";
}

void use_mainloop(const char* name) { asked() = parse("cuda_mainloop", name); }

}  // namespace attnx::cuda
