// The table says what each operator supports on each backend. The rows stand in capabilities.json, from which CMake
// writes capability_table.h; refusals, attnx.explain, the table of the docs and the tests all read them.
#pragma once

#include <string_view>

namespace attnx {

struct Capability {
  std::string_view op, backend;
  std::string_view dtypes;  // "float32, bfloat16"
  int head_dim_min, head_dim_max;
  std::string_view features;  // "causal, window"
  bool backward;
};

}  // namespace attnx

#include "attnx/capability_table.h"  // kCapabilities[], kCapabilitiesJson

namespace attnx {

// It returns null where the operator has no kernel on the backend.
constexpr const Capability* find_capability(std::string_view op, std::string_view backend) {
  for (const Capability& row : kCapabilities)
    if (row.op == op && row.backend == backend) return &row;
  return nullptr;
}

// It tells whether a list like "causal, window" holds the name.
constexpr bool lists(std::string_view list, std::string_view name) {
  while (!list.empty()) {
    const auto end = list.find(", ");
    if (list.substr(0, end) == name) return true;
    list = end == list.npos ? std::string_view() : list.substr(end + 2);
  }
  return false;
}

}  // namespace attnx
