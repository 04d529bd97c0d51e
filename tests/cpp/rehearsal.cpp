// A Launcher for a machine without a GPU: "device" memory is the host's, a launch runs the kernels'
// bodies here and now, and a graph is a list of launches to run again. What it is loaded for is
// everything around the kernels: the plan, the image, what is uploaded, captured, skipped, counted.
// A plain shared library: tests/rehearsal.py loads it with ctypes.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "bodies.h"
#include "device/launcher.h"

namespace {

using namespace fusedopt;
using namespace fusedopt::device;
using namespace fusedopt::testing;

constexpr int kHostThreads = 3;  // an odd number of steps in every loop over a chunk

struct Graph {
  std::vector<std::function<void()>> launches;
  std::vector<std::function<void()>> releases;
};

class Rehearsal final : public Launcher {
 public:
  int multiprocessors() override { return 2; }

  Status load(const StorageTuple&, int, int) override { return nullptr; }

  Status update(const StorageTuple& storage, int rule, int variant, const DeviceTable& table,
                const Epilogue& epilogue, Stream) override {
    ++updates;
    return over_chunks(update_of(rule, variant, storage_index(storage)), table, epilogue);
  }

  Status prepare(int rule, bool in_double, const PrepareTable& table, const StepDecision* decision,
                 Stream) override {
    ++prepares;
    const RunSlot run = prepare_of(rule, in_double);
    return launch([=] {
      for (int64_t slot = 0; slot < table.slot_count; ++slot) run(table, decision, slot);
    });
  }

  Status norm(const StorageTuple& storage, const DeviceTable& table, const Measure& measure,
              const DecisionInputs& inputs, Stream) override {
    ++norms;
    const RunNorm run = norm_of(storage.grad, storage.param);
    return launch([=] {
      for (int64_t chunk = 0; chunk < table.chunk_count; ++chunk) {
        run(table, inputs, measure, chunk);
      }
      finish_norm(inputs, measure);
    });
  }

  Status accumulate(const StorageTuple& storage, const DeviceTable& table, const Epilogue& epilogue,
                    Stream) override {
    ++accumulates;
    const RunAccumulate run = accumulate_of(storage.grad, storage.param);
    return launch([=] {
      for (int64_t chunk = 0; chunk < table.chunk_count; ++chunk) {
        for (int t = 0; t < kHostThreads; ++t) run(table, epilogue, chunk, t, kHostThreads);
      }
    });
  }

  bool capturing(Stream) override { return captured != nullptr; }

  Status keep(Stream, void* object, void (*release)(void*)) override {
    captured->releases.emplace_back([=] { release(object); });
    return nullptr;
  }

  Status place(void** at, const void* from, size_t bytes) override {
    ++placed;
    *at = std::malloc(bytes);
    std::memcpy(*at, from, bytes);
    return nullptr;
  }
  void drop(void* at) override {
    --placed;
    std::free(at);
  }

  Graph* captured = nullptr;
  int64_t updates = 0;
  int64_t prepares = 0;
  int64_t norms = 0;
  int64_t accumulates = 0;
  int64_t placed = 0;
  Status failure = nullptr;  // of the next launch

 private:
  Status launch(std::function<void()> run) {
    const Status status = failure;
    failure = nullptr;
    if (status != nullptr) return status;
    if (captured != nullptr) {
      captured->launches.push_back(std::move(run));
    } else {
      run();
    }
    return nullptr;
  }

  Status over_chunks(RunChunk body, const DeviceTable& table, const Epilogue& epilogue) {
    return launch([=] {
      for (int64_t chunk = 0; chunk < table.chunk_count; ++chunk) {
        for (int t = 0; t < kHostThreads; ++t) body(table, epilogue, chunk, t, kHostThreads);
      }
    });
  }
};

Rehearsal rehearsal;

}  // namespace

extern "C" {
__attribute__((visibility("default"))) void* rehearsal_launcher() {
  return static_cast<Launcher*>(&rehearsal);
}
// Launches so far: updates, prepares, norms, accumulations; then captured tables that there are.
__attribute__((visibility("default"))) int64_t rehearsal_count(int what) {
  const int64_t counts[] = {rehearsal.updates, rehearsal.prepares, rehearsal.norms,
                            rehearsal.accumulates, rehearsal.placed};
  return counts[what];
}
__attribute__((visibility("default"))) void rehearsal_fail(const char* status) {
  rehearsal.failure = status;
}
__attribute__((visibility("default"))) void* rehearsal_begin() {
  return rehearsal.captured = new Graph;
}
__attribute__((visibility("default"))) void rehearsal_end() { rehearsal.captured = nullptr; }
__attribute__((visibility("default"))) void rehearsal_replay(void* graph) {
  for (const auto& run : static_cast<Graph*>(graph)->launches) run();
}
__attribute__((visibility("default"))) void rehearsal_destroy(void* graph) {
  for (const auto& release : static_cast<Graph*>(graph)->releases) release();
  delete static_cast<Graph*>(graph);
}
}
