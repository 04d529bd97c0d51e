// The CPU driver: one parallel region over the chunks of all tables, whatever the number of
// tensors, dtypes and flags.
#pragma once

#include <functional>
#include <vector>

#include "core/table.h"
#include "cpu/tiers.h"

namespace fusedopt {

// Runs `worker` on every thread of some pool and returns when all have: the plan passes torch's own
// pool, the C++ tests pass plain threads. A worker takes chunks until none is left, so any number
// of workers, one included, does all the work.
using RunWorkers = std::function<void(const std::function<void()>& worker)>;

// What is done to a table: by which kernel, and around it.
struct Work {
  enum class Kind { kUpdate, kNorm, kAccumulate };

  const Table* table;
  Kernel kernel;
  Kind kind = Kind::kUpdate;
  Epilogue epilogue = {};
  NormSums* sums = nullptr;  // of the first row's first block; of norms
  double in = 1.0;           // see Task
};

// Does all of it, for every row that takes part. Rows whose arrays run through memory in one order
// are worked on in place; others are gathered block by block into buffers and scattered.
void run_tables(const std::vector<Work>& work, const RunWorkers& run_workers);

}  // namespace fusedopt
