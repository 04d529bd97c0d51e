#include "plan/triton.h"

#include <bit>

namespace fusedopt {

namespace {

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Kernels take integers alone; they make a double of its bits.
int64_t bits(double value) { return std::bit_cast<int64_t>(value); }

}  // namespace

int TritonLauncher::multiprocessors() { return kernels_.attr("multiprocessors")().cast<int>(); }

cuda::Status TritonLauncher::load(const StorageTuple& storage, int rule, int variant) {
  kernels_.attr("load")(rule, variant, int(storage.param), int(storage.grad), int(storage.state));
  return nullptr;
}

cuda::Status TritonLauncher::update(const StorageTuple& storage, int rule, int variant,
                                    const cuda::DeviceTable& table, const cuda::Scaler& scaler,
                                    const Pass& pass, cuda::Stream stream) {
  kernels_.attr("update")(rule, variant, int(storage.param), int(storage.grad), int(storage.state),
                          address(table.rows), address(table.chunks), address(table.layouts),
                          address(table.slots), table.chunk_count, address(scaler.grad_scale),
                          address(scaler.found_inf), address(pass.verdict), pass.zero_grads,
                          address(stream));
  return nullptr;
}

cuda::Status TritonLauncher::prepare(int rule, bool in_double, const cuda::PrepareTable& table,
                                     const cuda::Scaler& scaler, const Verdict* verdict,
                                     cuda::Stream stream) {
  kernels_.attr("prepare")(rule, in_double, address(table.prepare), address(table.hypers),
                           address(table.slots), table.slot_count, address(scaler.found_inf),
                           address(verdict), address(stream));
  return nullptr;
}

cuda::Status TritonLauncher::norm(const StorageTuple& storage, const cuda::DeviceTable& table,
                                  const cuda::Measure& measure, const Question& question,
                                  cuda::Stream stream) {
  kernels_.attr("norm")(
      int(storage.param), int(storage.grad), address(table.rows), address(table.chunks),
      address(table.layouts), table.chunk_count, address(measure.blocks), measure.block_count,
      address(measure.total), address(measure.verdict), measure.last, measure.decides,
      int(question.purpose), question.check, question.mean, question.grads, bits(question.max_norm),
      bits(question.weight), address(question.live_weight), address(question.grad_scale),
      address(question.found_inf), address(stream));
  return nullptr;
}

cuda::Status TritonLauncher::accumulate(const StorageTuple& storage, const cuda::DeviceTable& table,
                                        const Pass& pass, cuda::Stream stream) {
  kernels_.attr("accumulate")(int(storage.param), int(storage.grad), address(table.rows),
                              address(table.chunks), address(table.layouts), table.chunk_count,
                              address(pass.verdict), pass.zero_grads, address(stream));
  return nullptr;
}

}  // namespace fusedopt
