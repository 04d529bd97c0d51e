// The update kernels, found by their place in the registry. The units update_*.cu define them for the
// storage tuples they name.
#pragma once

namespace fusedopt::cuda {

// The kernel's address, as cudaLaunchKernel takes it; its arguments are a DeviceTable and a Scaler.
template <class P, class G, class S>
const void* find_kernel(int rule, int variant);

// The kernel that fills scalar slots, for fp32 or fp64 arithmetic; its arguments are a PrepareTable
// and a Scaler, its threads one a slot.
const void* find_prepare_kernel(int rule, bool in_double);

// The traffic floor of a rule with so many states; its arguments are those of an update.
const void* find_floor_kernel(int states);

}  // namespace fusedopt::cuda
