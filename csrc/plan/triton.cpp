#include "plan/triton.h"

namespace fusedopt {

namespace {

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

int TritonLauncher::multiprocessors() { return kernels_.attr("multiprocessors")().cast<int>(); }

cuda::Status TritonLauncher::load(const StorageTuple& storage, int rule, int variant) {
  kernels_.attr("load")(rule, variant, int(storage.param), int(storage.grad), int(storage.state));
  return nullptr;
}

cuda::Status TritonLauncher::update(const StorageTuple& storage, int rule, int variant,
                                    const cuda::DeviceTable& table, const cuda::Scaler& scaler,
                                    cuda::Stream stream) {
  kernels_.attr("update")(rule, variant, int(storage.param), int(storage.grad), int(storage.state),
                          address(table.rows), address(table.chunks), address(table.layouts),
                          address(table.slots), table.chunk_count, address(scaler.grad_scale),
                          address(scaler.found_inf), address(stream));
  return nullptr;
}

cuda::Status TritonLauncher::prepare(int rule, bool in_double, const cuda::PrepareTable& table,
                                     const cuda::Scaler& scaler, cuda::Stream stream) {
  kernels_.attr("prepare")(rule, in_double, address(table.prepare), address(table.hypers),
                           address(table.slots), table.slot_count, address(scaler.found_inf),
                           address(stream));
  return nullptr;
}

cuda::Status TritonLauncher::floor(int states, const cuda::DeviceTable& table,
                                   cuda::Stream stream) {
  kernels_.attr("floor")(states, address(table.rows), address(table.chunks), address(table.layouts),
                         address(table.slots), table.chunk_count, address(stream));
  return nullptr;
}

}  // namespace fusedopt
