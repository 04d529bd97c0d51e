// The bodies of the CUDA kernels as functions of the host, found as the kernels are.
#pragma once

#include "cuda/body.h"
#include "cuda/norm.h"
#include "device/prepare.h"

namespace fusedopt::testing {

using RunChunk = void (*)(const cuda::DeviceTable& table, const cuda::Scaler& scaler,
                          const Pass& pass, int64_t chunk, int thread, int threads);
using RunSlot = void (*)(const cuda::PrepareTable& table, const cuda::Scaler& scaler,
                         const Verdict* verdict, int64_t slot);
using RunNorm = void (*)(const cuda::DeviceTable& table, const Question& question,
                         const cuda::Measure& measure, int64_t chunk);
using RunAccumulate = void (*)(const cuda::DeviceTable& table, const Pass& pass, int64_t chunk,
                               int thread, int threads);

// An update kernel, for one thread: it clears where the step is skipped.
template <class Body>
void run_update(const cuda::DeviceTable& table, const cuda::Scaler& scaler, const Pass& pass,
                int64_t chunk, int thread, int threads) {
  if (!cuda::skips(scaler, pass.verdict)) {
    Body::run(table, scaler, pass, chunk, thread, threads);
  } else if (Body::clears(pass)) {
    Body::clear(table, pass, chunk, thread, threads);
  }
}

template <class Rule, int kVariant = 0>
RunChunk update_of_variant(int variant, int storage) {
  if constexpr (kVariant < Rule::kVariants) {
    if (variant != kVariant) return update_of_variant<Rule, kVariant + 1>(variant, storage);
    constexpr RunChunk kBodies[] = {
#define BODY(P, G, S)                                                                         \
  run_update<cuda::Body<Rule, kVariant, StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, \
                        StorageOf<DType::S>::Type>>,
        FUSEDOPT_FOR_EACH_STORAGE(BODY)
#undef BODY
    };
    return kBodies[storage];
  } else {
    return nullptr;
  }
}

inline RunChunk update_of(int rule, int variant, int storage) {
  int index = 0;
#define FIND(name, Rule) \
  if (rule == index++) return update_of_variant<Rule>(variant, storage);
  FUSEDOPT_FOR_EACH_RULE(FIND)
#undef FIND
  return nullptr;
}

inline RunSlot prepare_of(int rule, bool in_double) {
  int index = 0;
#define FIND(name, Rule)                                                                   \
  if (rule == index++) {                                                                   \
    return in_double ? cuda::prepare_slot<Rule, double> : cuda::prepare_slot<Rule, float>; \
  }
  FUSEDOPT_FOR_EACH_RULE(FIND)
#undef FIND
  return nullptr;
}

// All lanes of a warp, then the fold that norm.cu does by shuffles.
template <class G, class T>
void run_norm(const cuda::DeviceTable& table, const Question& question,
              const cuda::Measure& measure, int64_t chunk) {
  using Body = cuda::NormBody<G, T>;
  const cuda::DeviceChunk piece = table.chunks[chunk];
  const cuda::DeviceRow& row = table.rows[piece.row];
  for (int64_t done = 0; done < piece.count; done += kNormBlock) {
    const int count =
        static_cast<int>(piece.count - done < kNormBlock ? piece.count - done : kNormBlock);
    double with[kNormClasses];
    double without[kNormClasses];
    for (int lane = 0; lane < cuda::kLanes; ++lane) {
      typename Body::Lane sums;
      Body::sum(table, row, piece.begin + done, count, T(weight_in(question)), lane, sums);
      for (int i = 0; i < Body::kSums; ++i) {
        with[Body::class_of(lane, i)] = sums.with[i];
        without[Body::class_of(lane, i)] = sums.without[i];
      }
    }
    measure.blocks[row.norm_block + (piece.begin + done) / kNormBlock] = {fold(with),
                                                                          fold(without)};
  }
}

// What the last block of threads does.
inline void finish_norm(const Question& question, const cuda::Measure& measure) {
  if (measure.last == 0) return;
  const NormSums sums = sum_blocks(measure.blocks, measure.block_count);
  if (measure.total != nullptr) *measure.total = sums;
  if (measure.decides != 0) decide(question, sums, *measure.verdict);
}

inline RunNorm norm_of(DType grad, DType compute) {
  if (grad == DType::kBF16) return run_norm<BF16, float>;
  if (grad == DType::kF16) return run_norm<F16, float>;
  return compute == DType::kF64 ? run_norm<double, double> : run_norm<float, float>;
}

inline RunAccumulate accumulate_of(DType grad, DType compute) {
  if (grad == DType::kBF16) return cuda::AccumulateBody<BF16, float>::run;
  if (grad == DType::kF16) return cuda::AccumulateBody<F16, float>::run;
  return compute == DType::kF64 ? cuda::AccumulateBody<double, double>::run
                                : cuda::AccumulateBody<float, float>::run;
}

}  // namespace fusedopt::testing
