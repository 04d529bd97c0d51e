// What launchers for GPUs have in common: graphs, and memory that graphs own. The calls are those of
// the runtime library that torch has loaded, CUDA's or HIP's, which agree in them but for the names'
// beginning; nothing is linked, so a build without a CUDA toolkit has them too.
#pragma once

#include <vector>

#include "device/image.h"
#include "device/launcher.h"

namespace fusedopt::device {

// Enumerators that CUDA and HIP share; launcher.cu compares them with CUDA's.
constexpr int kStreamNonBlocking = 1;
constexpr int kMemcpyHostToDevice = 1;
constexpr int kCaptureModeRelaxed = 2;
constexpr unsigned kUserObjectNoDestructorSync = 1;
constexpr unsigned kGraphUserObjectMove = 1;
constexpr unsigned kEventDisableTiming = 2;

class GpuLauncher : public Launcher {
 public:
  bool capturing(Stream stream) override;
  Status keep(Stream stream, void* object, void (*release)(void*)) override;
  Status place(void** at, const void* from, size_t bytes) override;
  void drop(void* at) override;
};

// Small uploads to one device, at the price of the copy alone: bytes pass through places in pinned
// memory, each with an event that says when the copy out of it is done.
class UploadRing {
 public:
  // Kept for good, as `pinned` has to be: nobody knows which copy is the last.
  UploadRing(std::byte* pinned, size_t place_bytes, size_t places)
      : pinned_(pinned), place_bytes_(place_bytes), events_(places) {}

  // Copies parts of what begins at `from` to the same parts at `to`, in the order of the stream,
  // with the ring's device current. `from` may change at once. Returns false, with nothing done,
  // where it is too much for a place, or the next one is still being read: nothing waits here.
  bool send(std::byte* to, const std::byte* from, const std::vector<Range>& ranges, Stream stream,
            Status& status);

 private:
  std::byte* pinned_;
  size_t place_bytes_;
  std::vector<void*> events_;  // null of places that were never used
  size_t next_ = 0;
};

// The path of that library; empty where none is loaded, or an unknown one.
const char* gpu_runtime();

}  // namespace fusedopt::device
