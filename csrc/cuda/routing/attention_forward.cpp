#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/routing/attention.h"
#include "cuda/routing/cluster_loop.h"
#include "cuda/routing/place_sums.h"

namespace attnx::cuda {

namespace {

struct RoutedForward {
  WorkspaceLayout layout;
  ClusterLoop loop;
  SortedLists places;
  char* sort;

  RoutedForward(const ForwardParams& p, void* workspace)
      : loop(p, layout, workspace),
        places(places_of(p.gather->queries, p.gather->clusters, loop.heads, layout, workspace)),
        sort(layout.place<char>(workspace, std::int64_t(sort_into_lists_workspace(places)))) {}
};

}  // namespace

std::size_t routed_forward_workspace(const ForwardParams& p) { return RoutedForward(p, nullptr).layout.bytes(); }

void routed_forward(const ForwardParams& p, const Launch& launch) {
  check_mainloop(launch.mainloop);
  const Range range("attnx::routing_attention");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const RoutedForward plan(p, launch.workspace);
  const Clusters& queries = p.gather->queries;
  sort_into_lists(plan.places, plan.sort, stream);
  plan.loop.prepare(p, stream);
  plan.loop.run(p, stream);
  launch_place_sums({p.batch, p.heads_q, queries.rows, queries.slots, int(p.value_dim), 1, plan.places.items,
                     plan.places.offsets, plan.loop.output, p.output, true},
                    p.dtype, stream);
}

KernelDescription describe_routed(const ForwardParams& p) {
  check_mainloop(asked_mainloop());
  WorkspaceLayout layout;
  const ClusterLoop loop(p, layout, nullptr);
  KernelDescription description{"attnx_forward_sm80",   "sm80", loop.rows, loop.keys, loop.head_dim,
                                are_gathers_aligned(p), 1,      ""};
  if (current_device().major == 9) description.why_not_sm90 = kWhyNotSm90;
  return description;
}

}  // namespace attnx::cuda
