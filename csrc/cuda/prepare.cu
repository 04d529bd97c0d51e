#include "cuda/kernels.h"
#include "cuda/prepare.h"

namespace fusedopt::cuda {

namespace {

template <class Rule, class T>
__global__ void update_prepare(PrepareTable table, Scaler scaler, const Verdict* verdict) {
  const int64_t slot = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (slot < table.slot_count) prepare_slot<Rule, T>(table, scaler, verdict, slot);
}

}  // namespace

const void* find_prepare_kernel(int rule, bool in_double) {
  int index = 0;
#define FUSEDOPT_FIND(name, Rule)                                                   \
  if (rule == index++) {                                                            \
    return in_double ? reinterpret_cast<const void*>(&update_prepare<Rule, double>) \
                     : reinterpret_cast<const void*>(&update_prepare<Rule, float>); \
  }
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  return nullptr;
}

}  // namespace fusedopt::cuda
