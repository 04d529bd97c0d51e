// The update kernels of some storage tuples, for every rule and variant of the registry. Included by
// the units that name the tuples, so that a build can compile them side by side.
#pragma once

#include "core/dispatch.h"
#include "cuda/body.h"
#include "cuda/kernels.h"

namespace fusedopt::cuda {

// A persistent grid: blocks walk the chunks in address order.
template <class Rule, int kVariant, class P, class G, class S>
__global__ void __launch_bounds__(kThreads, 2) update(DeviceTable table, Epilogue epilogue) {
  const bool skip = skips(epilogue.decision);
  if (skip && !Body<Rule, kVariant, P, G, S>::clears(epilogue)) return;
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    const int thread = static_cast<int>(threadIdx.x);
    if (skip) {
      Body<Rule, kVariant, P, G, S>::clear(table, epilogue, chunk, thread, kThreads);
    } else {
      Body<Rule, kVariant, P, G, S>::run(table, epilogue, chunk, thread, kThreads);
    }
  }
}

template <class P, class G, class S>
const void* find_kernel(int rule, int variant) {
  return visit_rule(rule, variant, []<class Rule, int kVariant>(Variant<Rule, kVariant>) {
    return reinterpret_cast<const void*>(&update<Rule, kVariant, P, G, S>);
  });
}

}  // namespace fusedopt::cuda
