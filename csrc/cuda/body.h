// What a block of threads does with a chunk, as a plain function of (thread, threads): kernels call
// it on the device, and the C++ tests on the host, one thread after the other.
#pragma once

#include <type_traits>

#include "core/dtype.h"
#include "device/table.h"
#include "rules/all.h"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fusedopt::cuda {

using namespace device;  // what kernels read

// Elements that one access moves.
template <class Storage, int kCount>
struct alignas(sizeof(Storage) * kCount) Pack {
  Storage element[kCount];
};

// The conversions of core/dtype.h; on the device, the instructions that do the same.
template <class Storage>
FUSEDOPT_HD typename ComputeOf<Storage>::Type from_storage(Storage x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Storage, F16>) return __half2float(__ushort_as_half(x.bits));
#endif
  return widen(x);
}
template <class Storage>
FUSEDOPT_HD Storage to_storage(typename ComputeOf<Storage>::Type x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Storage, BF16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
  if constexpr (std::is_same_v<Storage, F16>) return {__half_as_ushort(__float2half_rn(x))};
#endif
  return Narrow<Storage>::from(x);
}

// The compiler cannot see that a pointer out of a table is to global memory, and would move data by
// generic accesses.
template <class Storage>
FUSEDOPT_HD Storage* global(Storage* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// `kWidth` elements from and to an address that is aligned for them.
template <int kWidth, class Storage, class T>
FUSEDOPT_HD void load(T (&to)[kWidth], const Storage* from) {
  constexpr int kCount =
      kWidth * sizeof(Storage) < kAccessBytes ? kWidth : kAccessBytes / sizeof(Storage);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kWidth; i += kCount) {
    const auto pack = *reinterpret_cast<const Pack<Storage, kCount>*>(global(from) + i);
    FUSEDOPT_UNROLL
    for (int j = 0; j < kCount; ++j) to[i + j] = T(from_storage(pack.element[j]));
  }
}
template <int kWidth, class Storage, class T>
FUSEDOPT_HD void store(Storage* to, const T (&from)[kWidth]) {
  constexpr int kCount =
      kWidth * sizeof(Storage) < kAccessBytes ? kWidth : kAccessBytes / sizeof(Storage);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kWidth; i += kCount) {
    Pack<Storage, kCount> pack;
    FUSEDOPT_UNROLL
    for (int j = 0; j < kCount; ++j) pack.element[j] = to_storage<Storage>(from[i + j]);
    *reinterpret_cast<Pack<Storage, kCount>*>(global(to) + i) = pack;
  }
}

// Where the i-th element of a row's array lies, whatever the row's layout.
FUSEDOPT_HD int64_t element_of(const DeviceTable& table, const DeviceRow& row, int array,
                               int64_t i) {
  if (row.layout < 0) return i;
  const DeviceLayout& layout = table.layouts[row.layout];
  int64_t at = 0;
  FUSEDOPT_NO_UNROLL
  for (int d = layout.dims - 1; d >= 0; --d) {
    at += i % layout.sizes[d] * layout.strides[array][d];
    i /= layout.sizes[d];
  }
  return at;
}

template <class Rule, int kVariant, class P, class G, class S>
struct Body {
  using T = typename ComputeOf<P>::Type;
  using SlotType = Slot<T, typename Rule::template Scalars<T>>;
  static constexpr int kStates = Rule::states(kVariant).count;
  static constexpr int kLeast = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  static constexpr int kWidest = kAccessBytes / (kLeast < int(sizeof(S)) ? kLeast : int(sizeof(S)));

  // What a thread needs of its chunk; null is what the row does not have.
  struct Chunk {
    P* param;
    G* grad;
    S* state[kMaxStates];
    T* accumulator;
    T* average;
    int count;
    const StepDecision* decision;
    bool zero_grads;
    bool write_grads;
    T factor;
    SlotType slot;
  };

  // The gradient that the rule sees, up to the factor.
  template <int kWidth>
  FUSEDOPT_HD static void gather_grad(const Chunk& chunk, const int64_t (&at)[kMaxArrays],
                                      T (&grad)[kWidth]) {
    const bool take =
        chunk.grad != nullptr && (chunk.decision == nullptr || chunk.decision->take != 0);
    if (take) {
      load(grad, chunk.grad + at[1]);
      if (chunk.write_grads) {
        T scaled[kWidth];
        const T factor = chunk.decision->template factor<T>();
        FUSEDOPT_UNROLL
        for (int i = 0; i < kWidth; ++i) scaled[i] = grad[i] * factor;
        store(chunk.grad + at[1], scaled);
      }
    } else {
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) grad[i] = 0;
    }
    if (chunk.accumulator != nullptr) {
      T sum[kWidth];
      load(sum, chunk.accumulator + at[2 + kAccumulator]);
      const T in = chunk.decision->template in<T>();
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) grad[i] = take ? sum[i] + grad[i] * in : sum[i];
      clear<kWidth>(chunk.accumulator + at[2 + kAccumulator]);
    }
  }

  template <int kWidth, class Storage>
  FUSEDOPT_HD static void clear(Storage* to) {
    typename ComputeOf<Storage>::Type zeros[kWidth];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kWidth; ++i) zeros[i] = 0;
    store(to, zeros);
  }

  // `at` are the elements' offsets into the arrays.
  template <int kWidth>
  FUSEDOPT_HD static void update(const Chunk& chunk, const int64_t (&at)[kMaxArrays]) {
    T param[kWidth];
    T grad[kWidth];
    T state[kMaxStates][kWidth];
    load(param, chunk.param + at[0]);
    FUSEDOPT_UNROLL
    for (int k = 0; k < kStates; ++k) load(state[k], chunk.state[k] + at[2 + k]);
    gather_grad(chunk, at, grad);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      T element_state[kMaxStates];
      FUSEDOPT_UNROLL
      for (int k = 0; k < kStates; ++k) element_state[k] = state[k][i];
      Rule::template update<kVariant>(param[i], grad[i] * chunk.factor, element_state,
                                      chunk.slot.scalars);
      FUSEDOPT_UNROLL
      for (int k = 0; k < kStates; ++k) state[k][i] = element_state[k];
    }
    store(chunk.param + at[0], param);
    FUSEDOPT_UNROLL
    for (int k = 0; k < kStates; ++k) store(chunk.state[k] + at[2 + k], state[k]);
    if (chunk.average != nullptr) update_average(chunk, at, param);
    if (chunk.zero_grads && chunk.grad != nullptr) clear<kWidth>(chunk.grad + at[1]);
  }

  // Of the parameter as it is stored.
  template <int kWidth>
  FUSEDOPT_HD static void update_average(const Chunk& chunk, const int64_t (&at)[kMaxArrays],
                                         const T (&param)[kWidth]) {
    T average[kWidth];
    load(average, chunk.average + at[2 + kAverage]);
    const T decay = chunk.decision->template ema_decay<T>();
    const T rest = chunk.decision->template ema_rest<T>();
    FUSEDOPT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      average[i] = decay * average[i] + rest * T(from_storage(to_storage<P>(param[i])));
    }
    store(chunk.average + at[2 + kAverage], average);
  }

  // Whole accesses of aligned elements. The width is the row's: all threads of a block take one branch.
  template <int kWidth = kWidest>
  FUSEDOPT_HD static void vectors(const Chunk& chunk, int width, int head, int count, int thread,
                                  int threads) {
    if constexpr (kWidth > 1) {
      if (width < kWidth) {
        return vectors<kWidth / 2>(chunk, width, head, count, thread, threads);
      }
      FUSEDOPT_NO_UNROLL
      for (int v = thread; v < count; v += threads) {
        int64_t at[kMaxArrays];
        FUSEDOPT_UNROLL
        for (int64_t& offset : at) offset = head + v * kWidth;
        update<kWidth>(chunk, at);
      }
    }
  }

  // All other elements, one a thread: `rest` of them, which are the first `head` ones and, `skipped`
  // elements later, those that follow. `layout` is null where arrays run through memory in one order.
  FUSEDOPT_HD static void others(const Chunk& chunk, const DeviceLayout* layout, int64_t begin,
                                 int head, int skipped, int rest, int thread, int threads) {
    FUSEDOPT_NO_UNROLL
    for (int r = thread; r < rest; r += threads) {
      int64_t left = r < head ? r : r + skipped;
      int64_t at[kMaxArrays] = {};
      if (layout != nullptr) left = offsets(*layout, begin + left, at);
      FUSEDOPT_UNROLL
      for (int64_t& offset : at) offset += left;
      update<1>(chunk, at);
    }
  }

  // Adds the offsets of element `left` into the arrays; returns what is left, which is 0.
  FUSEDOPT_HD static int64_t offsets(const DeviceLayout& layout, int64_t left,
                                     int64_t (&at)[kMaxArrays]) {
    FUSEDOPT_NO_UNROLL
    for (int d = layout.dims - 1; d >= 0; --d) {
      const int64_t index = left % layout.sizes[d];
      left /= layout.sizes[d];
      FUSEDOPT_UNROLL
      for (int a = 0; a < 2 + kStates; ++a) at[a] += index * layout.strides[a][d];
      FUSEDOPT_UNROLL
      for (int a = 2 + kAccumulator; a < kMaxArrays; ++a) at[a] += index * layout.strides[a][d];
    }
    return left;
  }

  FUSEDOPT_HD static void run(const DeviceTable& table, const Epilogue& epilogue,
                              int64_t chunk_index, int thread, int threads) {
    const DeviceChunk piece = table.chunks[chunk_index];
    const DeviceRow& row = table.rows[piece.row];
    if (row.grad == nullptr && row.state[kAccumulator] == nullptr) return;
    const bool linear = row.layout < 0;
    const int64_t begin = linear ? piece.begin : 0;
    Chunk chunk;
    chunk.param = static_cast<P*>(row.param) + begin;
    chunk.grad = offset<G>(row.grad, begin);
    FUSEDOPT_UNROLL
    for (int k = 0; k < kStates; ++k) chunk.state[k] = static_cast<S*>(row.state[k]) + begin;
    chunk.accumulator = offset<T>(row.state[kAccumulator], begin);
    chunk.average = offset<T>(row.state[kAverage], begin);
    chunk.count = piece.count;
    chunk.decision = epilogue.decision;
    chunk.zero_grads = epilogue.zero_grads != 0;
    chunk.write_grads = epilogue.write_grads != 0;
    chunk.slot = static_cast<const SlotType*>(table.slots)[row.slot];
    chunk.factor = chunk.slot.grad_factor;
    if (epilogue.decision != nullptr)
      chunk.factor = chunk.factor * epilogue.decision->template factor<T>();
    const bool wide = linear && row.width > 1;
    const int head = wide && row.head < chunk.count ? row.head : chunk.count;
    const int count = wide ? (chunk.count - head) / row.width : 0;
    vectors(chunk, row.width, head, count, thread, threads);
    const int aligned = count * row.width;
    others(chunk, linear ? nullptr : table.layouts + row.layout, piece.begin, head, aligned,
           chunk.count - aligned, thread, threads);
  }

  // What a step that is skipped still does: it empties the window, and clears gradients if asked to.
  FUSEDOPT_HD static bool clears(const Epilogue& epilogue) {
    return epilogue.zero_grads != 0 || epilogue.decision != nullptr;
  }
  FUSEDOPT_HD static void clear(const DeviceTable& table, const Epilogue& epilogue,
                                int64_t chunk_index, int thread, int threads) {
    const DeviceChunk piece = table.chunks[chunk_index];
    const DeviceRow& row = table.rows[piece.row];
    auto* grad = epilogue.zero_grads != 0 ? static_cast<G*>(row.grad) : nullptr;
    auto* accumulator = static_cast<T*>(row.state[kAccumulator]);
    FUSEDOPT_NO_UNROLL
    for (int i = thread; i < piece.count; i += threads) {
      if (grad != nullptr) {
        clear<1>(grad + element_of(table, row, 1, piece.begin + i));
      }
      if (accumulator != nullptr) {
        clear<1>(accumulator + element_of(table, row, 2 + kAccumulator, piece.begin + i));
      }
    }
  }

 private:
  template <class Storage>
  FUSEDOPT_HD static Storage* offset(void* array, int64_t begin) {
    return array == nullptr ? nullptr : static_cast<Storage*>(array) + begin;
  }
};

}  // namespace fusedopt::cuda
