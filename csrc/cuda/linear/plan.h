// A plan of linear attention says where its matrices lie in the workspace, and how many units a launch serves.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/linear/arguments.h"

namespace attnx::cuda {

struct LinearPlan {
  LinearArguments arguments;  // without the units
  std::int64_t units, units_of_section;
  std::size_t workspace;

  // This calls run(arguments) for each section of units, whose states the L2 cache holds together.
  template <class Run>
  void for_each_section(const Run& run) const {
    LinearArguments section = arguments;
    for (section.first_unit = 0; section.first_unit < units; section.first_unit += units_of_section) {
      section.units = std::min(units_of_section, units - section.first_unit);
      run(section);
    }
  }
};

// Addresses are in this workspace; in one at null they are offsets.
LinearPlan plan_linear(const LinearParams& params, bool aligned, bool backward, void* workspace);

}  // namespace attnx::cuda
