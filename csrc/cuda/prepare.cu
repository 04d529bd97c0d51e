#include "core/dispatch.h"
#include "cuda/kernels.h"
#include "device/prepare.h"

namespace fusedopt::cuda {

using namespace device;

namespace {

template <class Rule, class T>
__global__ void update_prepare(PrepareTable table, const StepDecision* decision) {
  const int64_t slot = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (slot < table.slot_count) prepare_slot<Rule, T>(table, decision, slot);
}

}  // namespace

const void* find_prepare_kernel(int rule, bool in_double) {
  return visit_rule(rule, 0, [in_double]<class Rule, int kVariant>(Variant<Rule, kVariant>) {
    return in_double ? reinterpret_cast<const void*>(&update_prepare<Rule, double>)
                     : reinterpret_cast<const void*>(&update_prepare<Rule, float>);
  });
}

}  // namespace fusedopt::cuda
