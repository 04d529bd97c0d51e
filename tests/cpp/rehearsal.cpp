// A Launcher for a machine without a GPU: "device" memory is the host's, a launch runs the kernels'
// bodies here and now, and a graph is a list of launches to run again. What it is loaded for is
// everything around the kernels: the plan, the image, what is uploaded, captured, skipped, counted.
// A plain shared library: tests/rehearsal.py loads it with ctypes.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "core/floor.h"
#include "cuda/body.h"
#include "cuda/launcher.h"
#include "cuda/prepare.h"

namespace {

using namespace fusedopt;
using namespace fusedopt::cuda;

using RunChunk = void (*)(const DeviceTable& table, const Scaler& scaler, int64_t chunk, int thread,
                          int threads);
using RunSlot = void (*)(const PrepareTable& table, const Scaler& scaler, int64_t slot);

constexpr int kHostThreads = 3;  // an odd number of steps in every loop over a chunk

template <class Rule, int kVariant = 0>
RunChunk body_of_variant(int variant, int storage) {
  if constexpr (kVariant < Rule::kVariants) {
    if (variant != kVariant) return body_of_variant<Rule, kVariant + 1>(variant, storage);
    constexpr RunChunk kBodies[] = {
#define BODY(P, G, S)                                                        \
  Body<Rule, kVariant, StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, \
       StorageOf<DType::S>::Type>::run,
        FUSEDOPT_FOR_EACH_STORAGE(BODY)
#undef BODY
    };
    return kBodies[storage];
  } else {
    return nullptr;
  }
}

RunChunk body_of(int rule, int variant, int storage) {
  int index = 0;
#define FIND(name, Rule) \
  if (rule == index++) return body_of_variant<Rule>(variant, storage);
  FUSEDOPT_FOR_EACH_RULE(FIND)
#undef FIND
  return nullptr;
}

RunSlot prepare_of(int rule, bool in_double) {
  int index = 0;
#define FIND(name, Rule) \
  if (rule == index++) return in_double ? prepare_slot<Rule, double> : prepare_slot<Rule, float>;
  FUSEDOPT_FOR_EACH_RULE(FIND)
#undef FIND
  return nullptr;
}

struct Graph {
  std::vector<std::function<void()>> launches;
  std::vector<std::function<void()>> releases;
};

class Rehearsal final : public Launcher {
 public:
  int multiprocessors() override { return 2; }

  Status load(const StorageTuple&, int, int) override { return nullptr; }

  Status update(const StorageTuple& storage, int rule, int variant, const DeviceTable& table,
                const Scaler& scaler, Stream) override {
    ++updates;
    return over_chunks(body_of(rule, variant, storage_index(storage)), table, scaler);
  }

  Status prepare(int rule, bool in_double, const PrepareTable& table, const Scaler& scaler,
                 Stream) override {
    ++prepares;
    const RunSlot run = prepare_of(rule, in_double);
    return launch([=] {
      for (int64_t slot = 0; slot < table.slot_count; ++slot) run(table, scaler, slot);
    });
  }

  Status floor(int states, const DeviceTable& table, Stream) override {
    const RunChunk floors[] = {
        Body<Floor<0>, 0, float, float, float>::run, Body<Floor<1>, 0, float, float, float>::run,
        Body<Floor<2>, 0, float, float, float>::run, Body<Floor<3>, 0, float, float, float>::run};
    return over_chunks(floors[states], table, {});
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

  Status over_chunks(RunChunk body, const DeviceTable& table, const Scaler& scaler) {
    return launch([=] {
      if (scaler.found_inf != nullptr && *scaler.found_inf != 0.0f) return;
      for (int64_t chunk = 0; chunk < table.chunk_count; ++chunk) {
        for (int t = 0; t < kHostThreads; ++t) body(table, scaler, chunk, t, kHostThreads);
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
__attribute__((visibility("default"))) int64_t rehearsal_count(int what) {
  return what == 0 ? rehearsal.updates : what == 1 ? rehearsal.prepares : rehearsal.placed;
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
