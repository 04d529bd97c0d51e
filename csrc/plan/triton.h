// A Launcher whose kernels Python launches: the Triton backend, see triton_kernels/multi_tensor.py.
#pragma once

#include <pybind11/pybind11.h>

#include "device/graph_runtime.h"

namespace fusedopt {

// Sizes of structs in device memory, places in them and constants, by the names that kernels in Triton
// give them. Python has them from here alone.
pybind11::dict layout();

// Gives a launch's numbers and addresses to `kernels`, an object with the methods multiprocessors,
// load and launch. Called with the GIL held; what they raise passes through.
class TritonLauncher final : public device::GpuLauncher {
 public:
  explicit TritonLauncher(pybind11::object kernels) : kernels_(std::move(kernels)) {}

  int multiprocessors() override;
  device::Status load(const StorageTuple& storage, int rule, int variant) override;
  device::Status update(const StorageTuple& storage, int rule, int variant,
                        const device::DeviceTable& table, const Epilogue& epilogue,
                        device::Stream stream) override;
  device::Status prepare(int rule, bool in_double, const device::PrepareTable& table,
                         const StepDecision* decision, device::Stream stream) override;
  device::Status norm(const StorageTuple& storage, const device::DeviceTable& table,
                      const device::Measure& measure, const DecisionInputs& inputs,
                      device::Stream stream) override;
  device::Status accumulate(const StorageTuple& storage, const device::DeviceTable& table,
                            const Epilogue& epilogue, device::Stream stream) override;

 private:
  // By the kernel's kind and what an instance of it is compiled for. `count` are chunks, or slots.
  template <class... Arguments>
  device::Status launch(const char* kind, const pybind11::tuple& key, int64_t count,
                        device::Stream stream, const Arguments&... arguments);

  pybind11::object kernels_;
};

}  // namespace fusedopt
