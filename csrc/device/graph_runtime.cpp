#include "device/graph_runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace fusedopt::device {

namespace {

struct Runtime {
  std::string path;
  const char* (*GetErrorString)(int);
  int (*Malloc)(void**, size_t);
  int (*Free)(void*);
  int (*StreamCreateWithFlags)(Stream*, unsigned);
  int (*StreamSynchronize)(Stream);
  int (*StreamDestroy)(Stream);
  int (*MemcpyAsync)(void*, const void*, size_t, int, Stream);
  int (*EventCreateWithFlags)(void**, unsigned);
  int (*EventRecord)(void*, Stream);
  int (*EventQuery)(void*);
  int (*GetLastError)();
  int (*StreamIsCapturing)(Stream, int*);
  int (*ThreadExchangeStreamCaptureMode)(int*);
  // The first is HIP's and CUDA 12's, the second CUDA 13's, which has no other.
  int (*StreamGetCaptureInfo_v2)(Stream, int*, unsigned long long*, void**, void*, void*);
  int (*StreamGetCaptureInfo)(Stream, int*, unsigned long long*, void**, void*, void*, void*);
  int (*UserObjectCreate)(void**, void*, void (*)(void*), unsigned, unsigned);
  int (*UserObjectRelease)(void*, unsigned);
  int (*GraphRetainUserObject)(void*, void*, unsigned, unsigned);
};

int is_runtime(dl_phdr_info* info, size_t, void* found) {
  const std::string path = info->dlpi_name;
  for (const char* name : {"/libcudart.so", "/libamdhip64.so"}) {
    if (path.find(name) == std::string::npos) continue;
    *static_cast<std::string*>(found) = path;
    return 1;
  }
  return 0;
}

Runtime load() {
  Runtime runtime{};
  std::string path;
  dl_iterate_phdr(is_runtime, &path);
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return runtime;
  const std::string prefix = path.find("libcudart") == std::string::npos ? "hip" : "cuda";
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, (prefix + name).c_str());
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    return symbol != nullptr;
  };
#define FUSEDOPT_FIND(name) complete = find(runtime.name, #name) && complete
  FUSEDOPT_FIND(GetErrorString);
  FUSEDOPT_FIND(Malloc);
  FUSEDOPT_FIND(Free);
  FUSEDOPT_FIND(StreamCreateWithFlags);
  FUSEDOPT_FIND(StreamSynchronize);
  FUSEDOPT_FIND(StreamDestroy);
  FUSEDOPT_FIND(MemcpyAsync);
  FUSEDOPT_FIND(EventCreateWithFlags);
  FUSEDOPT_FIND(EventRecord);
  FUSEDOPT_FIND(EventQuery);
  FUSEDOPT_FIND(GetLastError);
  FUSEDOPT_FIND(StreamIsCapturing);
  FUSEDOPT_FIND(ThreadExchangeStreamCaptureMode);
  FUSEDOPT_FIND(UserObjectCreate);
  FUSEDOPT_FIND(UserObjectRelease);
  FUSEDOPT_FIND(GraphRetainUserObject);
#undef FUSEDOPT_FIND
  const bool info = find(runtime.StreamGetCaptureInfo_v2, "StreamGetCaptureInfo_v2") ||
                    find(runtime.StreamGetCaptureInfo, "StreamGetCaptureInfo");
  if (complete && info) runtime.path = path;
  return runtime;
}

const Runtime& runtime() {
  static const Runtime runtime = load();
  return runtime;
}

Status status_of(int error) { return error == 0 ? nullptr : runtime().GetErrorString(error); }

constexpr Status kNoRuntime = "torch has loaded no CUDA or HIP runtime library that has graphs";

// A call that is forbidden to a thread while it captures, though it has nothing to do with the
// graph.
class UncapturedCalls {
 public:
  UncapturedCalls() { runtime().ThreadExchangeStreamCaptureMode(&mode_); }
  ~UncapturedCalls() { runtime().ThreadExchangeStreamCaptureMode(&mode_); }
  UncapturedCalls(const UncapturedCalls&) = delete;
  UncapturedCalls& operator=(const UncapturedCalls&) = delete;

 private:
  int mode_ = kCaptureModeRelaxed;
};

int graph_of(Stream stream, void** graph) {
  int status = 0;
  if (runtime().StreamGetCaptureInfo_v2 != nullptr) {
    return runtime().StreamGetCaptureInfo_v2(stream, &status, nullptr, graph, nullptr, nullptr);
  }
  return runtime().StreamGetCaptureInfo(stream, &status, nullptr, graph, nullptr, nullptr, nullptr);
}

}  // namespace

const char* gpu_runtime() { return runtime().path.c_str(); }

bool GpuLauncher::capturing(Stream stream) {
  if (runtime().path.empty()) return false;
  int status = 0;
  return runtime().StreamIsCapturing(stream, &status) == 0 && status != 0;
}

Status GpuLauncher::keep(Stream stream, void* object, void (*release)(void*)) {
  if (runtime().path.empty()) return kNoRuntime;
  void* graph = nullptr;
  if (const int error = graph_of(stream, &graph)) return status_of(error);
  void* owned = nullptr;
  int error = runtime().UserObjectCreate(&owned, object, release, 1, kUserObjectNoDestructorSync);
  if (error != 0) return status_of(error);
  error = runtime().GraphRetainUserObject(graph, owned, 1, kGraphUserObjectMove);
  if (error != 0) runtime().UserObjectRelease(owned, 1);
  return status_of(error);
}

Status GpuLauncher::place(void** at, const void* from, size_t bytes) {
  if (runtime().path.empty()) return kNoRuntime;
  const UncapturedCalls uncaptured;
  int error = runtime().Malloc(at, bytes);
  if (error != 0) return status_of(error);
  Stream stream = nullptr;
  error = runtime().StreamCreateWithFlags(&stream, kStreamNonBlocking);
  if (error == 0) {
    error = runtime().MemcpyAsync(*at, from, bytes, kMemcpyHostToDevice, stream);
    if (error == 0) error = runtime().StreamSynchronize(stream);
    runtime().StreamDestroy(stream);
  }
  if (error != 0) runtime().Free(*at);
  return status_of(error);
}

bool UploadRing::send(std::byte* to, const std::byte* from, const std::vector<Range>& ranges,
                      Stream stream, Status& status) {
  status = nullptr;
  size_t bytes = 0;
  for (const Range& range : ranges) bytes += range.end - range.begin;
  if (bytes > place_bytes_ || runtime().path.empty()) return false;
  if (bytes == 0) return true;
  const UncapturedCalls uncaptured;  // another stream or thread may be at it
  void*& event = events_[next_];
  int error = 0;
  if (event == nullptr) {
    error = runtime().EventCreateWithFlags(&event, kEventDisableTiming);
  } else if (runtime().EventQuery(event) != 0) {
    runtime().GetLastError();  // "not ready" stays behind as an error that others would find
    return false;
  }
  std::byte* place = pinned_ + next_ * place_bytes_;
  for (const Range& range : ranges) {
    if (error != 0) break;
    const size_t size = range.end - range.begin;
    std::memcpy(place, from + range.begin, size);
    error = runtime().MemcpyAsync(to + range.begin, place, size, kMemcpyHostToDevice, stream);
    place += size;
  }
  if (error == 0) error = runtime().EventRecord(event, stream);
  next_ = (next_ + 1) % events_.size();
  status = status_of(error);
  return true;
}

void GpuLauncher::drop(void* at) {
  const UncapturedCalls uncaptured;
  runtime().Free(at);  // at the end of a process the device may be gone already: nobody to tell
}

}  // namespace fusedopt::device
