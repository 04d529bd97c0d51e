#include "fake_runtime.h"

#include <cstring>
#include <deque>

namespace {

constexpr int kNotReady = 600;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Event {
  size_t after;  // it is reached when so many copies have been made
};

std::deque<Copy> waiting;
std::deque<Event> events;
size_t made = 0;
int failure = 0;
int left_behind = 0;
char queue;  // what a stream's address is

int fails() {
  const int error = failure;
  failure = 0;
  return error;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT size_t fake_run(size_t most) {
  size_t count = 0;
  for (; count < most && !waiting.empty(); ++count, ++made) {
    std::memcpy(waiting.front().to, waiting.front().from, waiting.front().bytes);
    waiting.pop_front();
  }
  return count;
}
EXPORT void fake_fail(int error) { failure = error; }
EXPORT int fake_errors() { return left_behind; }

EXPORT const char* cudaGetErrorString(int) { return "a fake error"; }
EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  if (const int error = fails()) return error;
  waiting.push_back({to, from, bytes});
  return 0;
}
EXPORT int cudaEventCreateWithFlags(void** event, unsigned) {
  *event = &events.emplace_back(Event{0});
  return 0;
}
EXPORT int cudaEventRecord(void* event, void*) {
  static_cast<Event*>(event)->after = made + waiting.size();
  return fails();
}
EXPORT int cudaEventQuery(void* event) {
  if (static_cast<Event*>(event)->after <= made) return 0;
  return left_behind = kNotReady;
}
EXPORT int cudaGetLastError() {
  const int error = left_behind;
  left_behind = 0;
  return error;
}
EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned) {
  *stream = &queue;
  return 0;
}

// What is looked for and never called here.
EXPORT int cudaMalloc(void**, size_t) { return 1; }
EXPORT int cudaFree(void*) { return 1; }
EXPORT int cudaStreamSynchronize(void*) { return 1; }
EXPORT int cudaStreamDestroy(void*) { return 1; }
EXPORT int cudaStreamIsCapturing(void*, int*) { return 1; }
EXPORT int cudaThreadExchangeStreamCaptureMode(int*) { return 0; }
EXPORT int cudaStreamGetCaptureInfo_v2(void*, int*, unsigned long long*, void**, void*, void*) {
  return 1;
}
EXPORT int cudaUserObjectCreate(void**, void*, void (*)(void*), unsigned, unsigned) { return 1; }
EXPORT int cudaUserObjectRelease(void*, unsigned) { return 1; }
EXPORT int cudaGraphRetainUserObject(void*, void*, unsigned, unsigned) { return 1; }
}
