// The contract of an update rule, and the few maths helpers that rules share.
//
// A rule is a struct of static members. It knows numbers, not tensors; a driver (cpu/, cuda/, the
// Triton template) knows tensors and no rule by name. The rules are the only C++ in the project
// that contains optimizer maths. A rule has four parts:
//
//   1. Names. `kHyperNames` lists the hyperparameters in the order of the fields of `Hyper`, spelled
//      as torch.optim spells them in `param_groups`. `states(variant)` lists the state tensors that
//      a variant uses, spelled as in `state_dict()`, and `kScalarStates` the numbers that a parameter
//      keeps from step to step, such as its `step`. A rule whose groups do not all need the latter
//      says which do: `keeps_scalar_states(hyper)`.
//   2. `Hyper`: what the user passed, as doubles (a bool is 0 or 1), one field a name.
//   3. `prepare<T>(hyper, scalar_states) -> Scalars<T>`: what depends only on the hyperparameters
//      and the scalar states, computed in double and narrowed once to the compute type T. It advances
//      the scalar states, as many as kScalarStates has, to what they are after the step; they are 0
//      where the group does not keep them.
//   4. `update<kVariant>(V& param, V grad, V* state, const Scalars<T>&)`: one element, or one vector
//      of elements. `kVariant` (from `variant(hyper)`) says which set of states there is; each set is
//      a kernel of its own. A flag that changes only the formula is a scalar: a branch on a scalar is
//      uniform over a row and costs nothing. Inside: separate multiply and add (no fma: every
//      compiler, instruction tier and interpreter can reproduce two roundings), no branch that
//      depends on tensor data, no `pow`.
//
// Drivers own the rest: loads, stores, conversion between storage and compute type (one rounding,
// at the store), the sign of `maximize`, tails, layouts, threads.
#pragma once

#include <cstdint>

// Always inlined: a copy that the linker could share between translation units compiled for
// different instruction sets must not exist.
#if defined(FUSEDOPT_HD)  // a test that instantiates every kernel at once
#elif defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD __attribute__((always_inline)) inline
#endif

#if defined(__CUDA_ARCH__)
#define FUSEDOPT_UNROLL _Pragma("unroll")
#define FUSEDOPT_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSEDOPT_UNROLL
#define FUSEDOPT_NO_UNROLL
#endif

namespace fusedopt {

// A hyperparameter's key in a param group; `index` >= 0 names an element of a tuple (betas).
struct HyperName {
  const char* key;
  int index = -1;
};

constexpr int kMaxStates = 3;

struct StateNames {
  int count;
  const char* names[kMaxStates];
};

constexpr int kMaxScalarStates = 3;

// A number of a parameter's state, in a tensor of one element.
struct ScalarState {
  // With a leading underscore, as only the last may have, it is not in `state_dict()`.
  const char* name = nullptr;
  double initial = 0.0;
  double loaded = 0.0;  // of a parameter whose states come from elsewhere, without this one
};
struct ScalarStates {
  int count;
  ScalarState states[kMaxScalarStates];
};

// The compute type of a scalar or of a vector of scalars. Drivers specialise it for their vectors.
template <class V>
struct ScalarOf {
  using Type = V;
};

// The helpers for one element. Drivers overload them for their vectors.
FUSEDOPT_HD static float sqrt(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_HD static double sqrt(double x) { return __builtin_sqrt(x); }

// NaN wins, as in torch.maximum.
FUSEDOPT_HD static float max(float a, float b) { return (a > b || a != a) ? a : b; }
FUSEDOPT_HD static double max(double a, double b) { return (a > b || a != a) ? a : b; }

// base^exponent by repeated squaring: the same bits on host and device, which libm's pow is not.
FUSEDOPT_HD static double power(double base, double exponent) {
  double result = 1.0;
  for (auto n = static_cast<uint64_t>(exponent); n != 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace fusedopt
