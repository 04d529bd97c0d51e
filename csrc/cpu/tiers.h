// The instruction tiers of the CPU driver. Each is one translation unit, compiled for its own
// instruction set from the same build; which one runs is decided at run time.
#pragma once

#include <string>
#include <vector>

#include "core/decision.h"
#include "core/table.h"

namespace fusedopt {

// A contiguous run of elements of one row; null where the row has no such array.
struct Span {
  void* param;
  void* grad;
  void* state[kMaxRowStates];
  int64_t count;
};

// What a kernel needs to know of a span beside its arrays.
struct Task {
  const void* slot = nullptr;  // the Slot of the row's rule and compute type; of updates
  Epilogue epilogue;
  NormSums* sums = nullptr;  // where those of the span's blocks go; of norms
  double in = 1.0;           // what they multiply gradients by before they add the accumulators
};

// Works on a span and asks for the beginning of the next. An update takes gradients from where the
// row has them; a norm sums blocks, of which a span has whole ones but for the row's last; an
// accumulation adds gradients to the accumulators.
using Kernel = void (*)(const Span& span, const Span& next, const Task& task);

// Finds a tier's update by rule index (the position in FUSEDOPT_FOR_EACH_RULE), variant and storage
// index, the other kernels by the gradient's type.
struct Tier {
  const char* name;
  bool (*supported)();
  Kernel (*kernel)(int rule, int variant, int storage);
  Kernel (*norm)(DType grad, DType compute);
  Kernel (*accumulate)(DType grad, DType compute);
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
