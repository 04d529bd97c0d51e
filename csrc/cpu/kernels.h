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

// The last elements of a span, too few for a vector, in buffers: a kernel's loop runs over these once
// more, so no access lies outside of the arrays. The same for all rules.
class Rest {
 public:
  // Bytes an element: of the parameter, the gradient, the states of the rule and the driver's own.
  struct Sizes {
    int8_t of[kMaxArrays];
  };
  template <class P, class G, class S, class T>
  static constexpr Sizes sizes() {
    Sizes made{{sizeof(P), sizeof(G)}};
    for (int k = 0; k < kMaxStates; ++k) made.of[2 + k] = sizeof(S);
    made.of[2 + kAccumulator] = made.of[2 + kAverage] = sizeof(T);
    return made;
  }

  __attribute__((noinline)) Rest(const Span& from, int64_t begin, const Sizes& sizes)
      : from_(from), sizes_(sizes) {
    const int64_t count = from.count - begin;
    for (int a = 0; a < kMaxArrays; ++a) {
      char*& array = at(from_, a);
      if (array == nullptr) continue;
      array += begin * sizes.of[a];
      __builtin_memset(buffers_[a], 0, FUSEDOPT_VECTOR_BYTES);
      __builtin_memcpy(buffers_[a], array, count * sizes.of[a]);
      at(span, a) = buffers_[a];
    }
    from_.count = count;
  }
  __attribute__((noinline)) void write_back(bool grad) {
    for (int a = 0; a < kMaxArrays; ++a) {
      char* array = at(from_, a);
      if (array == nullptr || (a == 1 && !grad)) continue;
      __builtin_memcpy(array, buffers_[a], from_.count * sizes_.of[a]);
    }
  }

  Span span{};  // over the buffers

 private:
  FUSEDOPT_INLINE static char*& at(Span& of, int array) {
    return reinterpret_cast<char*&>(array == 0   ? of.param
                                    : array == 1 ? of.grad
                                                 : of.state[array - 2]);
  }

  alignas(64) char buffers_[kMaxArrays][FUSEDOPT_VECTOR_BYTES];
  Span from_;
  Sizes sizes_;
};

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

  // What the driver does around the rule: the same for all of a launch.
  struct Around {
    T factor = 1;
    T in = 1;
    T decay = 0;
    T rest = 0;
    bool take = true;
    bool zero = false;
    bool write = false;
    explicit Around(const Epilogue& epilogue) {
      zero = epilogue.zero_grads != 0;
      write = epilogue.write_grads != 0;
      if (epilogue.decision == nullptr) return;
      factor = epilogue.decision->template factor<T>();
      in = epilogue.decision->template in<T>();
      decay = epilogue.decision->template ema_decay<T>();
      rest = epilogue.decision->template ema_rest<T>();
      take = epilogue.decision->take != 0;
    }
  };

  template <bool kPlain>
  FUSEDOPT_INLINE static void vector(const Arrays& at, int64_t i, T factor, const Around& around,
                                     const SlotType& slot) {
    V p = load(at.param + i);
    V g = kPlain ? load(at.grad + i) : gather_grad(at, i, around);
    g = g * factor;
    V s[kMaxStates];
    for (int k = 0; k < kStates; ++k) s[k] = load(at.state[k] + i);
    Rule::template update<kVariant>(p, g, s, slot.scalars);
    store(at.param + i, p);
    for (int k = 0; k < kStates; ++k) store(at.state[k] + i, s[k]);
    if (!kPlain) finish(at, i, around);
  }

  // The gradient that the rule sees, up to the factor.
  FUSEDOPT_INLINE static V gather_grad(const Arrays& at, int64_t i, const Around& around) {
    V g{};
    if (at.grad != nullptr && around.take) {
      g = load(at.grad + i);
      if (around.write) store(at.grad + i, g * around.factor);
    }
    if (at.accumulator != nullptr) {
      prefetch(ahead_of(at.accumulator + i));
      const V sum = load(at.accumulator + i);
      g = at.grad != nullptr && around.take ? sum + g * around.in : sum;
      store(at.accumulator + i, V{});
    }
    return g;
  }
  FUSEDOPT_INLINE static void finish(const Arrays& at, int64_t i, const Around& around) {
    if (at.average != nullptr) {  // of the parameter as it is stored
      prefetch(ahead_of(at.average + i));
      const V average = load(at.average + i);
      store(at.average + i, around.decay * average + around.rest * load(at.param + i));
    }
    if (around.zero && at.grad != nullptr) store(at.grad + i, V{});
  }

  static void run(const Span& span, const Span& next, const Task& task) {
    // Most steps find a gradient and nothing else: their loop has no branches.
    const bool plain = task.epilogue.decision == nullptr && task.epilogue.zero_grads == 0;
    const auto loop = plain ? loop_over<true> : loop_over<false>;
    const int64_t whole = span.count - span.count % V::kLanes;
    if (whole != 0) loop(span, whole, next, task);
    if (whole == span.count) return;
    constexpr Rest::Sizes kSizes = Rest::sizes<P, G, S, T>();
    Rest rest(span, whole, kSizes);
    loop(rest.span, V::kLanes, rest.span, task);
    rest.write_back(task.epilogue.zero_grads != 0 || task.epilogue.write_grads != 0);
  }

  template <bool kPlain>
  __attribute__((noinline)) static void loop_over(const Span& span, int64_t count, const Span& next,
                                                  const Task& task) {
    const SlotType slot = *static_cast<const SlotType*>(task.slot);
    const Arrays at(span);
    const Around around(task.epilogue);
    const T factor = slot.grad_factor * around.factor;

    // Ahead of the last elements lie the first ones of the next span.
    constexpr int64_t kAhead = kPrefetchAhead / sizeof(P);
    const int64_t ends[] = {count > kAhead ? count - kAhead : 0, count};
    const auto or_param = [](const Span& of) { return of.grad != nullptr ? of.grad : of.param; };
    uintptr_t ahead[2 + kMaxStates] = {ahead_of(at.param), ahead_of(or_param(span))};
    for (int k = 0; k < kStates; ++k) ahead[2 + k] = ahead_of(at.state[k]);
    int64_t i = 0;
    for (const int64_t end : ends) {
      for (; i < end; i += V::kLanes) {
        at.prefetch_at(ahead, i);
        vector<kPlain>(at, i, factor, around, slot);
      }
      const auto begin = [&](const void* array, size_t size) {
        return reinterpret_cast<uintptr_t>(array) - i * size;
      };
      ahead[0] = begin(next.param, sizeof(P));
      ahead[1] = begin(or_param(next), sizeof(G));
      for (int k = 0; k < kStates; ++k) ahead[2 + k] = begin(next.state[k], sizeof(S));
    }
  }
};

// Sums of squares; core/norm.h says in which order. A block of 1,024 elements in 256 classes is
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
    const T in = task.epilogue.decision->template in<T>();
    const bool take = task.epilogue.decision->take != 0;
    const bool zero = task.epilogue.zero_grads != 0;
    const int64_t whole = span.count - span.count % V::kLanes;
    for (int64_t i = 0; i < whole; i += V::kLanes) {
      prefetch(ahead_of(grad + i));
      prefetch(ahead_of(accumulator + i));
      vector(grad + i, accumulator + i, in, take, zero);
    }
    if (whole == span.count) return;
    Rest rest(span, whole, Rest::sizes<G, G, T, T>());
    vector(static_cast<G*>(rest.span.grad), static_cast<T*>(rest.span.state[kAccumulator]), in,
           take, zero);
    rest.write_back(zero);
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
