// The CPU kernels of one instruction tier: load, convert, Rule::update, convert, store. Included by
// each tier's unit, after it defined FUSEDOPT_TIER and FUSEDOPT_VECTOR_BYTES.
#pragma once

#include "core/dispatch.h"
#include "cpu/tiers.h"
#include "cpu/vec.h"

namespace fusedopt::FUSEDOPT_TIER {
namespace {

// Bytes between a load and the prefetch for it, into the second-level cache: the step is bound by
// reads, and this distance measured 5 to 15% faster than the hardware prefetchers alone.
constexpr int64_t kPrefetchAhead = 1024;

// What to prefetch at an offset into an array: a number, for it may lie beyond any array. Never for an
// array that is not there: an address that is not mapped is looked up all the way, each time.
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

  struct Arrays {
    P* param;
    G* grad;
    S* state[kMaxStates];
    T* accumulator;
    T* average;

    explicit Arrays(const Span& span)
        : param(static_cast<P*>(span.param)),
          grad(static_cast<G*>(span.grad)),
          accumulator(static_cast<T*>(span.state[kAccumulator])),
          average(static_cast<T*>(span.state[kAverage])) {
      for (int k = 0; k < kStates; ++k) state[k] = static_cast<S*>(span.state[k]);
    }
    FUSEDOPT_INLINE void prefetch_at(const uintptr_t* ahead, int64_t i) const {
      prefetch(ahead[0] + i * sizeof(P));
      prefetch(ahead[1] + i * sizeof(G));
      for (int k = 0; k < kStates; ++k) prefetch(ahead[2 + k] + i * sizeof(S));
    }
  };

  // What the driver does around the rule; without it (kPlain) there is a gradient and nothing else.
  struct Around {
    T factor = 1;
    T in = 1;
    T decay = 0;
    T rest = 0;
    bool take = true;
    bool zero = false;

    explicit Around(const Pass& pass) {
      zero = pass.zero_grads != 0;
      if (pass.verdict == nullptr) return;
      factor = pass.verdict->template factor<T>();
      in = pass.verdict->template in<T>();
      decay = pass.verdict->template ema_decay<T>();
      rest = pass.verdict->template ema_rest<T>();
      take = pass.verdict->take != 0;
    }
  };

  template <bool kPlain>
  FUSEDOPT_INLINE static void vector(const Arrays& at, int64_t i, T factor, const Around& around,
                                     const SlotType& slot) {
    V p = load(at.param + i);
    V g{};
    if (kPlain || (at.grad != nullptr && around.take)) g = load(at.grad + i);
    if (!kPlain && at.accumulator != nullptr) {
      const V sum = load(at.accumulator + i);
      g = at.grad != nullptr && around.take ? sum + g * around.in : sum;
      store(at.accumulator + i, V{});
    }
    g = g * factor;
    V s[kMaxStates];
    for (int k = 0; k < kStates; ++k) s[k] = load(at.state[k] + i);
    Rule::template update<kVariant>(p, g, s, slot.scalars);
    store(at.param + i, p);
    for (int k = 0; k < kStates; ++k) store(at.state[k] + i, s[k]);
    if (kPlain) return;
    if (at.average != nullptr) {  // of the parameter as it is stored
      const V average = load(at.average + i);
      store(at.average + i, around.decay * average + around.rest * load(at.param + i));
    }
    if (around.zero && at.grad != nullptr) store(at.grad + i, V{});
  }

  static void run(const Span& span, const Span& next, const Task& task) {
    const bool plain = task.pass.verdict == nullptr && task.pass.zero_grads == 0;
    return plain ? run_as<true>(span, next, task) : run_as<false>(span, next, task);
  }

  template <bool kPlain>
  static void run_as(const Span& span, const Span& next, const Task& task) {
    const SlotType slot = *static_cast<const SlotType*>(task.slot);
    const Arrays at(span);
    const Around around(task.pass);
    const T factor = slot.grad_factor * around.factor;

    // Ahead of the last elements lie the first ones of the next span.
    constexpr int64_t kAhead = kPrefetchAhead / sizeof(P);
    const int64_t whole = span.count - span.count % V::kLanes;
    const int64_t ends[] = {whole > kAhead ? whole - kAhead : 0, whole};
    const auto or_param = [](const Span& of) { return of.grad != nullptr ? of.grad : of.param; };
    uintptr_t ahead[2 + kMaxStates] = {ahead_of(at.param), ahead_of(or_param(span))};
    for (int k = 0; k < kStates; ++k) ahead[2 + k] = ahead_of(at.state[k]);
    int64_t i = 0;
    for (const int64_t end : ends) {
      for (; i < end; i += V::kLanes) {
        at.prefetch_at(ahead, i);
        if (!kPlain && at.accumulator != nullptr) prefetch(ahead_of(at.accumulator + i));
        if (!kPlain && at.average != nullptr) prefetch(ahead_of(at.average + i));
        vector<kPlain>(at, i, factor, around, slot);
      }
      const auto begin = [&](const void* array, size_t size) {
        return reinterpret_cast<uintptr_t>(array) - i * size;
      };
      ahead[0] = begin(next.param, sizeof(P));
      ahead[1] = begin(or_param(next), sizeof(G));
      for (int k = 0; k < kStates; ++k) ahead[2 + k] = begin(next.state[k], sizeof(S));
    }
    if (i < span.count) tail<kPlain>(at, i, span.count - i, factor, around, slot);
  }

  // The last, partial vector goes through buffers: the same instructions as the body, hence the
  // same bits, and no access outside the arrays.
  template <bool kPlain>
  static void tail(const Arrays& from, int64_t begin, int64_t count, T factor, const Around& around,
                   const SlotType& slot) {
    P param[V::kLanes] = {};
    G grad[V::kLanes] = {};
    S state[kMaxStates][V::kLanes] = {};
    T accumulator[V::kLanes] = {};
    T average[V::kLanes] = {};
    Arrays at = from;
    const auto take = [&](auto*& array, auto* buffer) {
      if (array == nullptr) return;
      __builtin_memcpy(buffer, array + begin, count * sizeof(*array));
      array = buffer;
    };
    const auto put = [&](auto* array, const auto* buffer) {
      if (array != nullptr) __builtin_memcpy(array + begin, buffer, count * sizeof(*array));
    };
    take(at.param, param);
    take(at.grad, grad);
    for (int k = 0; k < kStates; ++k) take(at.state[k], state[k]);
    if (!kPlain) {
      take(at.accumulator, accumulator);
      take(at.average, average);
    }
    vector<kPlain>(at, 0, factor, around, slot);
    put(from.param, param);
    for (int k = 0; k < kStates; ++k) put(from.state[k], state[k]);
    if (kPlain) return;
    put(from.accumulator, accumulator);
    put(from.average, average);
    if (around.zero) put(from.grad, grad);
  }
};

// Sums of squares; core/onepass.h says in which order. A block of 1,024 elements in 256 classes is
// four rounds of 256: registers go through it column by column, and fold with the column half a round
// away at once.
template <class G, class T>
struct Norm {
  using V = Vec<T>;
  static constexpr int kDoubles = Vec<double>::kLanes;
  static constexpr int kParts = V::kLanes / kDoubles;  // vectors of doubles a column
  static constexpr int kHalf = kNormClasses / 2;
  static constexpr int kRounds = kNormBlock / kNormClasses;

  static void run(const Span& span, const Span& next, const Task& task) {
    const auto* grad = static_cast<const G*>(span.grad);
    const auto* accumulator = static_cast<const T*>(span.state[kAccumulator]);
    const T in = static_cast<T>(task.in);
    NormSums* to = task.sums;
    for (int64_t begin = 0; begin < span.count; begin += kNormBlock, ++to) {
      const int64_t count = span.count - begin;
      const G* g = grad != nullptr ? grad + begin : nullptr;
      const T* a = accumulator != nullptr ? accumulator + begin : nullptr;
      const void* ahead = count > kNormBlock ? static_cast<const void*>(g + kNormBlock) : next.grad;
      if (ahead == nullptr) ahead = g;
      if (count >= kNormBlock) {
        *to = sums(g, a, in, kRounds, reinterpret_cast<uintptr_t>(ahead));
      } else {
        *to = tail(g, a, in, count, reinterpret_cast<uintptr_t>(ahead));
      }
    }
  }

  // The last block of a row, whose missing elements are zero; the rounds that it has none of are left
  // out, which changes no sum.
  static NormSums tail(const G* grad, const T* accumulator, T in, int64_t count, uintptr_t ahead) {
    const int rounds = static_cast<int>((count + kNormClasses - 1) / kNormClasses);
    G grad_buffer[kNormBlock];
    T accumulator_buffer[kNormBlock];
    const auto take = [&](auto*& array, auto* buffer) {
      if (array == nullptr) return;
      const int64_t size = sizeof(*array);
      __builtin_memcpy(buffer, array, count * size);
      __builtin_memset(buffer + count, 0, (rounds * kNormClasses - count) * size);
      array = buffer;
    };
    take(grad, grad_buffer);
    take(accumulator, accumulator_buffer);
    return sums(grad, accumulator, in, rounds, ahead);
  }

  FUSEDOPT_INLINE static NormSums sums(const G* grad, const T* accumulator, T in, int rounds,
                                       uintptr_t ahead) {
    if (accumulator == nullptr) {
      return {fold_columns(
                  [&](int64_t i, Vec<double>* to) {
                    prefetch(ahead + i * sizeof(G));
                    load_doubles(grad + i, to);
                  },
                  rounds),
              0.0};
    }
    const auto without = [&](int64_t i, Vec<double>* to) { load_doubles(accumulator + i, to); };
    if (grad == nullptr) {
      const double sum = fold_columns(without, rounds);
      return {sum, sum};
    }
    const auto with = [&](int64_t i, Vec<double>* to) {
      prefetch(ahead + i * sizeof(G));
      to_doubles(load(accumulator + i) + load(grad + i) * in, to);
    };
    return {fold_columns(with, rounds), fold_columns(without, rounds)};
  }

  template <class Column>
  FUSEDOPT_INLINE static double fold_columns(const Column& column, int rounds) {
    Vec<double> half[kHalf / kDoubles];
    for (int c = 0; c < kHalf; c += V::kLanes) {
      Vec<double> low[kParts] = {};
      Vec<double> high[kParts] = {};
      for (int round = 0; round < rounds; ++round) {
        Vec<double> values[kParts];
        column(c + round * kNormClasses, values);
        for (int part = 0; part < kParts; ++part)
          low[part] = low[part] + values[part] * values[part];
        column(c + kHalf + round * kNormClasses, values);
        for (int part = 0; part < kParts; ++part)
          high[part] = high[part] + values[part] * values[part];
      }
      for (int part = 0; part < kParts; ++part) half[c / kDoubles + part] = low[part] + high[part];
    }
    for (int count = kHalf / kDoubles / 2; count > 0; count /= 2) {
      for (int i = 0; i < count; ++i) half[i] = half[i] + half[i + count];
    }
    double lanes[kDoubles];
    store(lanes, half[0]);
    for (int count = kDoubles / 2; count > 0; count /= 2) {
      for (int i = 0; i < count; ++i) lanes[i] += lanes[i + count];
    }
    return lanes[0];
  }
};

template <class G, class T>
struct Accumulate {
  using V = Vec<T>;

  static void run(const Span& span, const Span& /*next*/, const Task& task) {
    auto* grad = static_cast<G*>(span.grad);
    auto* accumulator = static_cast<T*>(span.state[kAccumulator]);
    const T in = task.pass.verdict->template in<T>();
    const bool take = task.pass.verdict->take != 0;
    const bool zero = task.pass.zero_grads != 0;
    int64_t i = 0;
    for (; i + V::kLanes <= span.count; i += V::kLanes) {
      prefetch(ahead_of(grad + i));
      prefetch(ahead_of(accumulator + i));
      vector(grad + i, accumulator + i, in, take, zero);
    }
    const int64_t count = span.count - i;
    if (count == 0) return;
    G grad_buffer[V::kLanes] = {};
    T accumulator_buffer[V::kLanes] = {};
    __builtin_memcpy(grad_buffer, grad + i, count * sizeof(G));
    __builtin_memcpy(accumulator_buffer, accumulator + i, count * sizeof(T));
    vector(grad_buffer, accumulator_buffer, in, take, zero);
    if (zero) __builtin_memcpy(grad + i, grad_buffer, count * sizeof(G));
    __builtin_memcpy(accumulator + i, accumulator_buffer, count * sizeof(T));
  }

  FUSEDOPT_INLINE static void vector(G* grad, T* accumulator, T in, bool take, bool zero) {
    if (take) {
      const V g = load(static_cast<const G*>(grad));
      store(accumulator, load(static_cast<const T*>(accumulator)) + g * in);
    }
    if (zero) store(grad, V{});
  }
};

}  // namespace

Kernel find_kernel(int rule, int variant, int storage) {
  return visit_rule(rule, variant, [storage]<class Rule, int kVariant>(Variant<Rule, kVariant>) {
    return visit_storage(storage, []<class P, class G, class S>(Types<P, G, S>) -> Kernel {
      return Update<Rule, kVariant, P, G, S>::run;
    });
  });
}

Kernel find_norm(DType grad, DType param) {
  return visit_grad(grad, param,
                    []<class G, class T>(Types<G, T>) -> Kernel { return Norm<G, T>::run; });
}
Kernel find_accumulate(DType grad, DType param) {
  return visit_grad(grad, param,
                    []<class G, class T>(Types<G, T>) -> Kernel { return Accumulate<G, T>::run; });
}

}  // namespace fusedopt::FUSEDOPT_TIER
