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

  RoutedForward(const ForwardParams& p, std::optional<Mainloop> asked, void* workspace)
      : loop(p, asked, layout, workspace),
        places(places_of(p.gather->queries, p.gather->clusters, loop.heads, layout, workspace)),
        sort(layout.place<char>(workspace, std::int64_t(sort_into_lists_workspace(places)))) {}
};

}  // namespace

std::size_t routed_forward_workspace(const ForwardParams& p, const Launch& launch) {
  return RoutedForward(p, launch.mainloop, nullptr).layout.bytes();
}

void routed_forward(const ForwardParams& p, const Launch& launch) {
  const Range range("attnx::routing_attention");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const RoutedForward plan(p, launch.mainloop, launch.workspace);
  const Clusters& queries = p.gather->queries;
  sort_into_lists(plan.places, plan.sort, stream);
  plan.loop.prepare(p, stream);
  plan.loop.run(p, stream);
  launch_place_sums({p.batch, p.heads_q, queries.rows, queries.slots, int(p.value_dim), 1, plan.places.items,
                     plan.places.offsets, plan.loop.output, p.output, true},
                    p.dtype, stream);
}

KernelDescription describe_routed(const ForwardParams& p) {
  WorkspaceLayout layout;
  const ClusterLoop loop(p, asked_mainloop(), layout, nullptr);
  const std::string mainloop = name_of(loop.mainloop);
  return {"attnx_forward_" + mainloop, mainloop, loop.rows,        loop.keys, loop.head_dim,
          are_gathers_aligned(p),      1,        loop.why_not_sm90};
}

}  // namespace attnx::cuda
