// What a step does with gradients besides updating, and what it makes of their norm: one arithmetic
// for all drivers, torch-free, host and device.
//
// A step that clips, checks, accumulates or averages makes two launches over a table: the first sums
// the squares of the gradients, the second updates. Between them stands a `StepDecision`, a few numbers in
// the memory of the device, which `decide` fills from the sums and the second launch obeys. The
// gradient that a rule sees is
//
//   (accumulator + grad * in) * factor    of a row with an accumulator,
//   grad * factor                         of any other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/norm.h"

namespace fusedopt {

// Result of the norm pass, read by the update kernel. Lives as long as the optimizer: `weight` is that
// of the accumulated micro-batches of the present window.
struct StepDecision {
  double weight = 0.0;  // of the micro-batches in the accumulators
  double norm = 0.0;    // of the gradient that the last update saw before it was clipped
  double factor64 = 1.0;
  double in64 = 1.0;
  double ema_decay64 = 0.0;  // of the average of the parameters; constant
  double ema_rest64 = 0.0;   // 1 - ema_decay
  float factor32 = 1.0f;
  float in32 = 1.0f;
  float ema_decay32 = 0.0f;
  float ema_rest32 = 0.0f;
  float norm32 = 0.0f;
  int32_t take = 1;    // 0: the gradients of this micro-batch are left out
  int32_t skip = 0;    // 1: nothing is updated
  int32_t ticket = 0;  // blocks of threads that have ended, for the last one to notice

  template <class T>
  FUSEDOPT_HD T factor() const {
    return sizeof(T) == 8 ? T(factor64) : T(factor32);
  }
  template <class T>
  FUSEDOPT_HD T in() const {
    return sizeof(T) == 8 ? T(in64) : T(in32);
  }
  template <class T>
  FUSEDOPT_HD T ema_decay() const {
    return sizeof(T) == 8 ? T(ema_decay64) : T(ema_decay32);
  }
  template <class T>
  FUSEDOPT_HD T ema_rest() const {
    return sizeof(T) == 8 ? T(ema_rest64) : T(ema_rest32);
  }
};
// What an update does beside its rule. Without a decision gradients are taken as they are, there is
// no accumulator and no average.
struct Epilogue {
  const StepDecision* decision = nullptr;
  int64_t zero_grads = 0;  // gradients are zero afterwards
  int64_t write_grads =
      0;  // those that are taken are multiplied by the decision's factor, for good
};

FUSEDOPT_HD static bool skips(const StepDecision* decision) {
  return decision != nullptr && decision->skip != 0;
}

enum class Purpose : int32_t {
  kUpdate,      // the gradients are the update's
  kAccumulate,  // they go to the accumulators
  kClose,       // the update's are the accumulators, and the gradients that there are
  kFlush,       // they are the accumulators alone; to `decide`, a kClose without gradients
};

constexpr bool closes(Purpose purpose) {
  return purpose == Purpose::kClose || purpose == Purpose::kFlush;
}

// What `decide` is told. Pointers are to memory of the device that decides, null where there is
// nothing.
struct DecisionInputs {
  Purpose purpose = Purpose::kUpdate;
  int32_t check = 0;       // gradients whose sum is not finite are left out
  int32_t mean = 1;        // a window's gradient is divided by its weight
  int32_t grads = 1;       // the window has a micro-batch that is not in the accumulators
  double max_norm = -1.0;  // clipped to this; negative: not clipped
  double weight = 1.0;     // of these gradients in their window
  const double* live_weight = nullptr;  // instead of it
  const float* grad_scale = nullptr;    // what the gradients are still multiplied by
  const float* found_inf = nullptr;     // not 0: somebody found that they are not finite
};
FUSEDOPT_HD static bool is_finite(double x) { return x - x == 0.0; }

// What gradients are multiplied by on their way to the accumulators.
FUSEDOPT_HD static double weight_in(const DecisionInputs& q) {
  const double weight = q.live_weight != nullptr ? *q.live_weight : q.weight;
  return q.grad_scale != nullptr ? weight / double(*q.grad_scale) : weight;
}

// Fills the decision from the sums over all rows; they are 0 without a norm pass.
FUSEDOPT_HD static void decide(const DecisionInputs& q, const NormSums& sums, StepDecision& v) {
  const bool found = q.found_inf != nullptr && *q.found_inf != 0.0f;
  const bool take = !found && (q.check == 0 || is_finite(sums.with));
  const double weight = q.live_weight != nullptr ? *q.live_weight : q.weight;
  v.take = take ? 1 : 0;
  v.in64 = weight_in(q);
  v.in32 = float(v.in64);
  if (q.purpose == Purpose::kAccumulate) {
    if (take) v.weight = v.weight + weight;
    return;
  }
  double factor = 1.0;
  if (q.purpose == Purpose::kClose) {
    const double total = take && q.grads != 0 ? v.weight + weight : v.weight;
    const double squares = take ? sums.with : sums.without;
    // Accumulators can overflow, too.
    v.skip = total > 0.0 && (q.check == 0 || is_finite(squares)) ? 0 : 1;
    v.weight = 0.0;
    if (q.mean != 0) factor = 1.0 / total;
    v.norm = sqrt(squares) * factor;
  } else {
    v.skip = take ? 0 : 1;
    if (q.grad_scale != nullptr) factor = 1.0 / double(*q.grad_scale);
    v.norm = sqrt(sums.with) * factor;
  }
  v.norm32 = float(v.norm);
  if (q.max_norm >= 0.0) {  // as torch.nn.utils.clip_grad_norm_ does, NaN included
    const double coefficient = q.max_norm / (v.norm + 1e-6);
    if (!(coefficient > 1.0)) factor = factor * coefficient;
  }
  v.factor64 = factor;
  v.factor32 = float(factor);
}

}  // namespace fusedopt
