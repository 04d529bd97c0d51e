// What a launch before the update does with gradients: their norm, or their way into the accumulators.
// Plain functions of (lane) or (thread, threads), like the bodies of the updates.
#pragma once

#include "cuda/body.h"

namespace fusedopt::cuda {

constexpr int kLanes = 32;  // threads that sum a block of a norm together

// What one lane adds to the sums of a block; core/norm.h says in which order. A lane takes as many
// neighbouring elements as an access moves, so each of its sums is of one class.
template <class G, class T>
struct NormBody {
  static constexpr int kWidth = kAccessBytes / static_cast<int>(sizeof(G));
  static constexpr int kSums = kNormClasses / kLanes;
  static constexpr int kTurn = kLanes * kWidth;  // elements that all lanes take at a time

  struct Lane {
    double with[kSums];
    double without[kSums];
  };

  FUSEDOPT_HD static int class_of(int lane, int sum) {
    return sum / kWidth * kTurn + lane * kWidth + sum % kWidth;
  }

  // The block that begins `begin` elements into the row.
  FUSEDOPT_HD static void sum(const DeviceTable& table, const DeviceRow& row, int64_t begin,
                              int count, T in, int lane, Lane& sums) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kSums; ++i) sums.with[i] = sums.without[i] = 0.0;
    const auto* grad = static_cast<const G*>(row.grad);
    const auto* accumulator = static_cast<const T*>(row.state[kAccumulator]);
    if (grad == nullptr && accumulator == nullptr) return;
    constexpr int kTurns = static_cast<int>(kNormBlock) / kTurn;
    const bool whole = count == kNormBlock && row.layout < 0 && aligned(grad + begin) &&
                       aligned(accumulator + begin);
    FUSEDOPT_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      const int first = turn * kTurn + lane * kWidth;
      T g[kWidth];
      T a[kWidth];
      FUSEDOPT_UNROLL
      for (int c = 0; c < kWidth; ++c) g[c] = a[c] = 0;
      if (whole) {
        if (grad != nullptr) load(g, grad + begin + first);
        if (accumulator != nullptr) load(a, accumulator + begin + first);
      } else {
        FUSEDOPT_UNROLL
        for (int c = 0; c < kWidth; ++c) {
          if (first + c >= count) continue;
          const int64_t i = begin + first + c;
          if (grad != nullptr) g[c] = T(from_storage(grad[element_of(table, row, 1, i)]));
          if (accumulator != nullptr) {
            a[c] = accumulator[element_of(table, row, 2 + kAccumulator, i)];
          }
        }
      }
      const int at = turn * kWidth % kSums;
      FUSEDOPT_UNROLL
      for (int c = 0; c < kWidth; ++c) {
        if (accumulator != nullptr) {
          sums.without[at + c] += double(a[c]) * double(a[c]);
          g[c] = grad != nullptr ? a[c] + g[c] * in : a[c];
        }
        sums.with[at + c] += double(g[c]) * double(g[c]);
      }
    }
  }

 private:
  FUSEDOPT_HD static bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
  }
};

// Adds the gradients of a chunk to its accumulators.
template <class G, class T>
struct AccumulateBody {
  static constexpr int kWidth = kAccessBytes / static_cast<int>(sizeof(G));

  template <int kCount>
  FUSEDOPT_HD static void add(G* grad, T* accumulator, T in, bool take, bool zero) {
    if (take) {
      T g[kCount];
      T a[kCount];
      load(g, grad);
      load(a, accumulator);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kCount; ++i) a[i] = a[i] + g[i] * in;
      store(accumulator, a);
    }
    if (zero) {
      T zeros[kCount];
      FUSEDOPT_UNROLL
      for (int i = 0; i < kCount; ++i) zeros[i] = 0;
      store(grad, zeros);
    }
  }

  FUSEDOPT_HD static void run(const DeviceTable& table, const Epilogue& epilogue,
                              int64_t chunk_index, int thread, int threads) {
    const DeviceChunk piece = table.chunks[chunk_index];
    const DeviceRow& row = table.rows[piece.row];
    auto* grad = static_cast<G*>(row.grad);
    auto* accumulator = static_cast<T*>(row.state[kAccumulator]);
    if (grad == nullptr) return;
    const bool take = epilogue.decision->take != 0;
    const bool zero = epilogue.zero_grads != 0;
    const T in = epilogue.decision->template in<T>();
    const auto aligned = [](const void* address) {
      return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
    };
    int done = 0;
    if (row.layout < 0 && aligned(grad + piece.begin) && aligned(accumulator + piece.begin)) {
      done = piece.count / kWidth * kWidth;
      FUSEDOPT_NO_UNROLL
      for (int i = thread * kWidth; i < done; i += threads * kWidth) {
        add<kWidth>(grad + piece.begin + i, accumulator + piece.begin + i, in, take, zero);
      }
    }
    FUSEDOPT_NO_UNROLL
    for (int i = done + thread; i < piece.count; i += threads) {
      const int64_t at = piece.begin + i;
      add<1>(grad + element_of(table, row, 1, at),
             accumulator + element_of(table, row, 2 + kAccumulator, at), in, take, zero);
    }
  }
};

}  // namespace fusedopt::cuda
