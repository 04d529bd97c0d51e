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

struct Work {
  const Table* table;
  Kernel kernel;
};

// Updates every active row of every table. Rows whose arrays run through memory in one order are
// updated in place; others are gathered block by block into buffers, updated there and scattered.
void run_tables(const std::vector<Work>& work, const RunWorkers& run_workers);

}  // namespace fusedopt
