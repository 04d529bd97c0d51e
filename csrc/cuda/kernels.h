// The update kernels, found by their place in the registry. The units update_*.cu define them for the
// storage tuples they name.
#pragma once

#include "core/dtype.h"

namespace fusedopt::cuda {

// The kernel's address, as cudaLaunchKernel takes it; its arguments are a DeviceTable
// and an Epilogue.
template <class P, class G, class S>
const void* find_kernel(int rule, int variant);

// The kernel that fills scalar slots, for fp32 or fp64 arithmetic; its arguments are a PrepareTable
// and a StepDecision's address, its threads one a slot.
const void* find_prepare_kernel(int rule, bool in_double);

// The kernel that sums a norm; its arguments are a DeviceTable, a Measure and a DecisionInputs. And the one
// that adds gradients to accumulators; a DeviceTable and a Epilogue.
const void* find_norm_kernel(DType grad, DType param);
const void* find_accumulate_kernel(DType grad, DType param);

}  // namespace fusedopt::cuda
