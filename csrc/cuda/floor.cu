#include "core/floor.h"
#include "cuda/body.h"
#include "cuda/kernels.h"

namespace fusedopt::cuda {

namespace {

// The grid and the loop of the updates; see update.cuh.
template <int kStates>
__global__ void __launch_bounds__(kThreads, 2) traffic_floor(DeviceTable table, Pass pass) {
  for (int64_t chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
    Body<Floor<kStates>, 0, float, float, float>::run(table, {}, pass, chunk,
                                                      static_cast<int>(threadIdx.x), kThreads);
  }
}

}  // namespace

const void* find_floor_kernel(int states) {
  const void* kernels[] = {reinterpret_cast<const void*>(&traffic_floor<0>),
                           reinterpret_cast<const void*>(&traffic_floor<1>),
                           reinterpret_cast<const void*>(&traffic_floor<2>),
                           reinterpret_cast<const void*>(&traffic_floor<3>)};
  return kernels[states];
}

}  // namespace fusedopt::cuda
