#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/body.h"
#include "cuda/kernels.h"
#include "cuda/launcher.h"

namespace fusedopt::cuda {

namespace {

Status status_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const void* kernel_of(const StorageTuple& storage, int rule, int variant) {
#define FUSEDOPT_FIND(P, G, S)                                               \
  if (storage == StorageTuple{DType::P, DType::G, DType::S}) {               \
    return find_kernel<StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, \
                       StorageOf<DType::S>::Type>(rule, variant);            \
  }
  FUSEDOPT_FOR_EACH_STORAGE(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  return nullptr;
}

// A call that CUDA forbids a thread while it captures, though it has nothing to do with the graph.
class UncapturedCalls {
 public:
  UncapturedCalls() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~UncapturedCalls() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  UncapturedCalls(const UncapturedCalls&) = delete;
  UncapturedCalls& operator=(const UncapturedCalls&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class CudaLauncher final : public Launcher {
 public:
  int multiprocessors() override {
    int device = 0;
    int count = 1;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    return count;
  }

  Status update(const StorageTuple& storage, int rule, int variant, const DeviceTable& table,
                const Scaler& scaler, Stream stream) override {
    return launch_over_chunks(kernel_of(storage, rule, variant), table, scaler, stream);
  }

  Status prepare(int rule, bool in_double, const PrepareTable& table, const Scaler& scaler,
                 Stream stream) override {
    const int64_t blocks = (table.slot_count + kThreads - 1) / kThreads;
    return launch(find_prepare_kernel(rule, in_double), blocks, table, scaler, stream);
  }

  Status floor(int states, const DeviceTable& table, Stream stream) override {
    return launch_over_chunks(find_floor_kernel(states), table, Scaler{}, stream);
  }

  bool capturing(Stream stream) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
           status != cudaStreamCaptureStatusNone;
  }

  Status keep(Stream stream, void* object, void (*release)(void*)) override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
    const auto info = cudaStreamGetCaptureInfo;
#else
    const auto info = [](cudaStream_t of, cudaStreamCaptureStatus* status, unsigned long long* id,
                         cudaGraph_t* graph, std::nullptr_t, std::nullptr_t, std::nullptr_t) {
      return cudaStreamGetCaptureInfo_v2(of, status, id, graph, nullptr, nullptr);
    };
#endif
    cudaError_t error = info(static_cast<cudaStream_t>(stream), &status, nullptr, &graph, nullptr,
                             nullptr, nullptr);
    if (error != cudaSuccess) return status_of(error);
    cudaUserObject_t owned = nullptr;
    error = cudaUserObjectCreate(&owned, object, release, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) return status_of(error);
    error = cudaGraphRetainUserObject(graph, owned, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(owned, 1);
    return status_of(error);
  }

  Status place(void** at, const void* from, size_t bytes) override {
    const UncapturedCalls uncaptured;
    cudaError_t error = cudaMalloc(at, bytes);
    if (error != cudaSuccess) return status_of(error);
    cudaStream_t stream = nullptr;
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(*at, from, bytes, cudaMemcpyHostToDevice, stream);
      if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
    if (error != cudaSuccess) cudaFree(*at);
    return status_of(error);
  }

  void drop(void* at) override {
    const UncapturedCalls uncaptured;
    cudaFree(at);  // at the end of a process the device may be gone already: nobody to tell
  }

 private:
  template <class Arguments>
  static Status launch(const void* kernel, int64_t blocks, Arguments table, Scaler scaler,
                       Stream stream) {
    void* arguments[] = {&table, &scaler};
    return status_of(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                      arguments, 0, static_cast<cudaStream_t>(stream)));
  }

  // As many blocks as run at once: each walks the chunks in steps of the grid.
  Status launch_over_chunks(const void* kernel, const DeviceTable& table, const Scaler& scaler,
                            Stream stream) {
    int blocks_each = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, kThreads, 0);
    if (error != cudaSuccess) return status_of(error);
    const int64_t blocks = std::min(table.chunk_count, int64_t{blocks_each} * multiprocessors());
    return launch(kernel, blocks, table, scaler, stream);
  }
};

}  // namespace

Launcher& cuda_launcher() {
  static CudaLauncher launcher;
  return launcher;
}

}  // namespace fusedopt::cuda
