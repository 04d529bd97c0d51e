// The CPU kernels of one instruction tier: load, convert, Rule::update, convert, store. Included by
// each tier's unit, after it defined FUSEDOPT_TIER and FUSEDOPT_VECTOR_BYTES.
#pragma once

#include "core/floor.h"
#include "cpu/tiers.h"
#include "cpu/vec.h"
#include "rules/all.h"

namespace fusedopt::FUSEDOPT_TIER {
namespace {

// Bytes between a load and the prefetch for it, into the second-level cache: the step is bound by
// reads, and this distance measured 5 to 15% faster than the hardware prefetchers alone.
constexpr int64_t kPrefetchAhead = 1024;

// What to prefetch at an offset into an array: a number, for it may lie beyond any array.
FUSEDOPT_INLINE uintptr_t ahead_of(const void* array) {
  return reinterpret_cast<uintptr_t>(array) + kPrefetchAhead;
}
FUSEDOPT_INLINE void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

template <class Rule, int kVariant, class P, class G, class S>
struct Update {
  using T = typename ComputeOf<P>::Type;
  using V = Vec<T>;
  static constexpr int kStates = Rule::states(kVariant).count;
  using SlotType = Slot<T, typename Rule::template Scalars<T>>;

  FUSEDOPT_INLINE static void vector(P* param, const G* grad, S* const* state,
                                     const SlotType& slot) {
    V p = load(param);
    const V g = load(grad) * slot.grad_factor;
    V s[kMaxStates];
    for (int k = 0; k < kStates; ++k) s[k] = load(state[k]);
    Rule::template update<kVariant>(p, g, s, slot.scalars);
    store(param, p);
    for (int k = 0; k < kStates; ++k) store(state[k], s[k]);
  }

  static void run(const Span& span, const Span& next, const void* slot_bytes) {
    const SlotType slot = *static_cast<const SlotType*>(slot_bytes);
    auto* param = static_cast<P*>(span.param);
    const auto* grad = static_cast<const G*>(span.grad);
    S* state[kMaxStates];
    for (int k = 0; k < kStates; ++k) state[k] = static_cast<S*>(span.state[k]);

    // Ahead of the last elements lie the first ones of the next span.
    constexpr int64_t kAhead = kPrefetchAhead / sizeof(P);
    const int64_t whole = span.count - span.count % V::kLanes;
    const int64_t ends[] = {whole > kAhead ? whole - kAhead : 0, whole};
    uintptr_t param_ahead = ahead_of(param);
    uintptr_t grad_ahead = ahead_of(grad);
    uintptr_t state_ahead[kMaxStates];
    for (int k = 0; k < kStates; ++k) state_ahead[k] = ahead_of(state[k]);
    int64_t i = 0;
    for (const int64_t end : ends) {
      for (; i < end; i += V::kLanes) {
        prefetch(param_ahead + i * sizeof(P));
        prefetch(grad_ahead + i * sizeof(G));
        S* at[kMaxStates];
        for (int k = 0; k < kStates; ++k) {
          prefetch(state_ahead[k] + i * sizeof(S));
          at[k] = state[k] + i;
        }
        vector(param + i, grad + i, at, slot);
      }
      param_ahead = reinterpret_cast<uintptr_t>(next.param) - i * sizeof(P);
      grad_ahead = reinterpret_cast<uintptr_t>(next.grad) - i * sizeof(G);
      for (int k = 0; k < kStates; ++k) {
        state_ahead[k] = reinterpret_cast<uintptr_t>(next.state[k]) - i * sizeof(S);
      }
    }
    if (i < span.count) {
      for (int k = 0; k < kStates; ++k) state[k] += i;
      tail(param + i, grad + i, state, span.count - i, slot);
    }
  }

  // The last, partial vector goes through buffers: the same instructions as the body, hence the
  // same bits, and no access outside the arrays.
  static void tail(P* param, const G* grad, S* const* state, int64_t count, const SlotType& slot) {
    P param_buffer[V::kLanes] = {};
    G grad_buffer[V::kLanes] = {};
    S state_buffer[kMaxStates][V::kLanes] = {};
    S* buffers[kMaxStates];
    __builtin_memcpy(param_buffer, param, count * sizeof(P));
    __builtin_memcpy(grad_buffer, grad, count * sizeof(G));
    for (int k = 0; k < kStates; ++k) {
      buffers[k] = state_buffer[k];
      __builtin_memcpy(buffers[k], state[k], count * sizeof(S));
    }
    vector(param_buffer, grad_buffer, buffers, slot);
    __builtin_memcpy(param, param_buffer, count * sizeof(P));
    for (int k = 0; k < kStates; ++k) __builtin_memcpy(state[k], buffers[k], count * sizeof(S));
  }
};

template <class Rule, int kVariant>
FUSEDOPT_INLINE Kernel by_storage(int storage) {
  constexpr Kernel kKernels[] = {
#define FUSEDOPT_KERNEL(P, G, S)                                               \
  Update<Rule, kVariant, StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, \
         StorageOf<DType::S>::Type>::run,
      FUSEDOPT_FOR_EACH_STORAGE(FUSEDOPT_KERNEL)
#undef FUSEDOPT_KERNEL
  };
  return kKernels[storage];
}

template <class Rule, int kVariant = 0>
Kernel by_variant(int variant, int storage) {
  if constexpr (kVariant < Rule::kVariants) {
    if (variant == kVariant) return by_storage<Rule, kVariant>(storage);
    return by_variant<Rule, kVariant + 1>(variant, storage);
  } else {
    return nullptr;
  }
}

}  // namespace

Kernel find_kernel(int rule, int variant, int storage) {
  int index = 0;
#define FUSEDOPT_FIND(name, Rule) \
  if (rule == index++) return by_variant<Rule>(variant, storage);
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  return nullptr;
}

Kernel find_floor(int states) {
  constexpr Kernel kFloors[] = {
      Update<Floor<0>, 0, float, float, float>::run, Update<Floor<1>, 0, float, float, float>::run,
      Update<Floor<2>, 0, float, float, float>::run, Update<Floor<3>, 0, float, float, float>::run};
  return kFloors[states];
}

}  // namespace fusedopt::FUSEDOPT_TIER
