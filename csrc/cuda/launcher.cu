#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "core/dispatch.h"
#include "cuda/body.h"
#include "cuda/kernels.h"
#include "device/graph_runtime.h"
#include "device/launcher.h"

namespace fusedopt::cuda {

namespace {

Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const void* kernel_of(const StorageTuple& storage, int rule, int variant) {
  return visit_storage(storage_index(storage),
                       [rule, variant]<class P, class G, class S>(Types<P, G, S>) {
                         return find_kernel<P, G, S>(rule, variant);
                       });
}

static_assert(kStreamNonBlocking == cudaStreamNonBlocking &&
              kMemcpyHostToDevice == cudaMemcpyHostToDevice &&
              kCaptureModeRelaxed == cudaStreamCaptureModeRelaxed &&
              kUserObjectNoDestructorSync == cudaUserObjectNoDestructorSync &&
              kGraphUserObjectMove == cudaGraphUserObjectMove &&
              kEventDisableTiming == cudaEventDisableTiming);

class CudaLauncher final : public GpuLauncher {
 public:
  int multiprocessors() override {
    int device = 0;
    int count = 1;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    return count;
  }

  // Kernels are loaded when they are first asked about.
  Status load(const StorageTuple& storage, int rule, int variant) override {
    cudaFuncAttributes attributes;
    const bool in_double = storage.param == DType::kF64;
    for (const void* kernel :
         {kernel_of(storage, rule, variant), find_prepare_kernel(rule, in_double),
          find_norm_kernel(storage.grad, storage.param),
          find_accumulate_kernel(storage.grad, storage.param)}) {
      const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
      if (error != cudaSuccess) return status_of(error);
    }
    return nullptr;
  }

  Status update(const StorageTuple& storage, int rule, int variant, const DeviceTable& table,
                const Epilogue& epilogue, Stream stream) override {
    return launch_over_chunks(kernel_of(storage, rule, variant), stream, table, epilogue);
  }

  Status prepare(int rule, bool in_double, const PrepareTable& table, const StepDecision* decision,
                 Stream stream) override {
    const int64_t blocks = (table.slot_count + kThreads - 1) / kThreads;
    return launch(find_prepare_kernel(rule, in_double), blocks, stream, table, decision);
  }

  Status norm(const StorageTuple& storage, const DeviceTable& table, const Measure& measure,
              const DecisionInputs& inputs, Stream stream) override {
    return launch_over_chunks(find_norm_kernel(storage.grad, storage.param), stream, table, measure,
                              inputs);
  }

  Status accumulate(const StorageTuple& storage, const DeviceTable& table, const Epilogue& epilogue,
                    Stream stream) override {
    return launch_over_chunks(find_accumulate_kernel(storage.grad, storage.param), stream, table,
                              epilogue);
  }

 private:
  template <class... Arguments>
  static Status launch(const void* kernel, int64_t blocks, Stream stream, Arguments... arguments) {
    void* addresses[] = {&arguments...};
    return status_of(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                      addresses, 0, static_cast<cudaStream_t>(stream)));
  }

  // As many blocks as run at once: each walks the chunks in steps of the grid.
  template <class... Arguments>
  Status launch_over_chunks(const void* kernel, Stream stream, const DeviceTable& table,
                            const Arguments&... arguments) {
    int64_t most = 0;
    const cudaError_t error = blocks_at_once(kernel, most);
    if (error != cudaSuccess) return status_of(error);
    const int64_t blocks = std::clamp(table.chunk_count, int64_t{1}, most);
    return launch(kernel, blocks, stream, table, arguments...);
  }

  // Of a kernel on the current device; asked once.
  cudaError_t blocks_at_once(const void* kernel, int64_t& most) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t& known = known_[{device, kernel}];
    if (known == 0) {
      int blocks_each = 0;
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, kThreads, 0);
      if (error != cudaSuccess) return error;
      known = int64_t{blocks_each} * multiprocessors();
    }
    most = known;
    return cudaSuccess;
  }

  std::mutex mutex_;
  std::map<std::pair<int, const void*>, int64_t> known_;
};

}  // namespace

}  // namespace fusedopt::cuda

namespace fusedopt {

device::Launcher& device::cuda_launcher() {
  static cuda::CudaLauncher launcher;
  return launcher;
}

}  // namespace fusedopt
