#include "bodies.h"

#include "core/dispatch.h"
#include "cuda/body.h"
#include "cuda/norm.h"

namespace fusedopt::testing {

namespace {

template <class Body>
void run_update(const device::DeviceTable& table, const Epilogue& epilogue, int64_t chunk,
                int thread, int threads) {
  if (!skips(epilogue.decision)) {
    Body::run(table, epilogue, chunk, thread, threads);
  } else if (Body::clears(epilogue)) {
    Body::clear(table, epilogue, chunk, thread, threads);
  }
}

template <class G, class T>
void run_norm(const device::DeviceTable& table, const DecisionInputs& inputs,
              const device::Measure& measure, int64_t chunk) {
  using Body = cuda::NormBody<G, T>;
  const device::DeviceChunk piece = table.chunks[chunk];
  const device::DeviceRow& row = table.rows[piece.row];
  for (int64_t done = 0; done < piece.count; done += kNormBlock) {
    const int count =
        static_cast<int>(piece.count - done < kNormBlock ? piece.count - done : kNormBlock);
    double with[kNormClasses];
    double without[kNormClasses];
    for (int lane = 0; lane < cuda::kLanes; ++lane) {
      typename Body::Lane sums;
      Body::sum(table, row, piece.begin + done, count, T(weight_in(inputs)), lane, sums);
      for (int i = 0; i < Body::kSums; ++i) {
        with[Body::class_of(lane, i)] = sums.with[i];
        without[Body::class_of(lane, i)] = sums.without[i];
      }
    }
    measure.blocks[row.norm_block + (piece.begin + done) / kNormBlock] = {fold(with),
                                                                          fold(without)};
  }
}

}  // namespace

RunChunk update_of(int rule, int variant, int storage) {
  return visit_rule(rule, variant, [&]<class Rule, int kVariant>(Variant<Rule, kVariant>) {
    return visit_storage(storage, []<class P, class G, class S>(Types<P, G, S>) -> RunChunk {
      return run_update<cuda::Body<Rule, kVariant, P, G, S>>;
    });
  });
}

RunSlot prepare_of(int rule, bool in_double) {
  return visit_rule(rule, 0, [&]<class Rule, int kVariant>(Variant<Rule, kVariant>) -> RunSlot {
    return in_double ? device::prepare_slot<Rule, double> : device::prepare_slot<Rule, float>;
  });
}

void finish_norm(const DecisionInputs& inputs, const device::Measure& measure) {
  if (measure.last == 0) return;
  const NormSums sums = sum_blocks(measure.blocks, measure.block_count);
  if (measure.total != nullptr) *measure.total = sums;
  if (measure.decides != 0) decide(inputs, sums, *measure.decision);
}

RunNorm norm_of(DType grad, DType param) {
  return visit_grad(grad, param,
                    []<class G, class T>(Types<G, T>) -> RunNorm { return run_norm<G, T>; });
}

RunAccumulate accumulate_of(DType grad, DType param) {
  return visit_grad(grad, param, []<class G, class T>(Types<G, T>) -> RunAccumulate {
    return cuda::AccumulateBody<G, T>::run;
  });
}

}  // namespace fusedopt::testing
