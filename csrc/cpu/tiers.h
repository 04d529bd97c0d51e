// The instruction tiers of the CPU driver. Each is one translation unit, compiled for its own
// instruction set from the same build; which one runs is decided at run time.
#pragma once

#include <string>
#include <vector>

#include "core/table.h"

namespace fusedopt {

// A contiguous run of elements of one row.
struct Span {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t count;
};

// Updates a span and asks for the beginning of the next; `slot` points to the Slot of the row's
// rule and compute type.
using Kernel = void (*)(const Span& span, const Span& next, const void* slot);

// Finds a tier's kernel by rule index (the position in FUSEDOPT_FOR_EACH_RULE), variant and storage
// index. The traffic floor is found by its number of states: the same loop, without a rule.
using FindKernel = Kernel (*)(int rule, int variant, int storage);
using FindFloor = Kernel (*)(int states);

struct Tier {
  const char* name;
  bool (*supported)();
  FindKernel kernel;
  FindFloor floor;
};

// All tiers of this build, slowest first; the first runs everywhere.
const std::vector<Tier>& built_tiers();

// The names of those this machine can run.
std::vector<std::string> available_tiers();

// The tier in use: the environment variable FUSEDOPT_CPU_TIER if set, the fastest available one
// otherwise, or what select_tier chose since. Throws std::runtime_error when the variable names a
// tier that is not available.
const Tier& current_tier();

// Throws std::runtime_error, changing nothing, when `name` is not available.
void select_tier(const std::string& name);

}  // namespace fusedopt
