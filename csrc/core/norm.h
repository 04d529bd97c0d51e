// How the norm of gradients is summed: one order for all drivers, torch-free, host and device.
//
// A row is cut into blocks of kNormBlock elements. Each is summed in double into kNormClasses sums,
// element e into sum e % kNormClasses, which are folded by halves; the blocks of all rows, in the
// order of the parameters, are then summed in the same way. So a norm has the same bits whatever the
// number of threads, the chunks, the instruction tier or the device.
#pragma once

#include <cstdint>

#include "rules/rule.h"

namespace fusedopt {

constexpr int64_t kNormBlock = 1024;
constexpr int kNormClasses = 256;

constexpr int64_t norm_blocks(int64_t numel) { return (numel + kNormBlock - 1) / kNormBlock; }

// The sums of squares of a block: of what the gradients and the accumulators come to, and of the
// accumulators alone, should the gradients turn out not to be finite.
struct NormSums {
  double with = 0.0;
  double without = 0.0;
};

FUSEDOPT_HD static double fold(double* sums) {
  for (int half = kNormClasses / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// The sum of what the blocks of all rows came to.
inline NormSums sum_blocks(const NormSums* blocks, int64_t count) {
  double with[kNormClasses] = {};
  double without[kNormClasses] = {};
  for (int64_t i = 0; i < count; ++i) {
    with[i % kNormClasses] += blocks[i].with;
    without[i % kNormClasses] += blocks[i].without;
  }
  return {fold(with), fold(without)};
}

}  // namespace fusedopt
