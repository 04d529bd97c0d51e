// What launchers for GPUs have in common: graphs, and memory that graphs own. The calls are those of
// the runtime library that torch has loaded, CUDA's or HIP's, which agree in them but for the names'
// beginning; nothing is linked, so a build without a CUDA toolkit has them too.
#pragma once

#include "cuda/launcher.h"

namespace fusedopt::cuda {

// Enumerators that CUDA and HIP share; launcher.cu compares them with CUDA's.
constexpr int kStreamNonBlocking = 1;
constexpr int kMemcpyHostToDevice = 1;
constexpr int kCaptureModeRelaxed = 2;
constexpr unsigned kUserObjectNoDestructorSync = 1;
constexpr unsigned kGraphUserObjectMove = 1;

class GpuLauncher : public Launcher {
 public:
  bool capturing(Stream stream) override;
  Status keep(Stream stream, void* object, void (*release)(void*)) override;
  Status place(void** at, const void* from, size_t bytes) override;
  void drop(void* at) override;
};

// The path of that library; empty where none is loaded, or an unknown one.
const char* gpu_runtime();

}  // namespace fusedopt::cuda
