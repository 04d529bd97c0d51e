// What a plan asks of a device: a few calls on raw pointers and a stream. Torch-free, and free of
// CUDA: launcher.cu implements it for CUDA, tests on the host. No call but `load` and `place` waits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "device/prepare.h"
#include "device/table.h"

namespace fusedopt::device {

// A cudaStream_t.
using Stream = void*;

// Null where all is well, otherwise what the device says of the error.
using Status = const char*;

// All calls are for the device that is current.
class Launcher {
 public:
  virtual ~Launcher() = default;

  virtual int multiprocessors() = 0;

  // Readies what the launches of a table will need, before anything is changed: kernels may have to
  // be compiled, and to be loaded, which a stream that captures does not allow.
  virtual Status load(const StorageTuple& storage, int rule, int variant) = 0;

  // One launch each, in the order of the stream. Rules and variants by their place in the registry.
  virtual Status update(const StorageTuple& storage, int rule, int variant,
                        const DeviceTable& table, const Epilogue& epilogue, Stream stream) = 0;
  virtual Status prepare(int rule, bool in_double, const PrepareTable& table,
                         const StepDecision* decision, Stream stream) = 0;
  // Sums the squares of a table's gradients, and makes a decision of them if told to: one launch,
  // of a table without chunks too.
  virtual Status norm(const StorageTuple& storage, const DeviceTable& table, const Measure& measure,
                      const DecisionInputs& inputs, Stream stream) = 0;
  virtual Status accumulate(const StorageTuple& storage, const DeviceTable& table,
                            const Epilogue& epilogue, Stream stream) = 0;

  // Whether what is launched on the stream now is recorded in a graph.
  virtual bool capturing(Stream stream) = 0;
  // While capturing: calls release(object) once neither the graph nor anything made from it is left,
  // on any thread; `release` must not call the device.
  virtual Status keep(Stream stream, void* object, void (*release)(void*)) = 0;
  // Memory with these bytes in it, for a graph: outside of every stream, capture and pool. Waits.
  virtual Status place(void** at, const void* from, size_t bytes) = 0;
  virtual void drop(void* at) = 0;
};

// The one for CUDA; in launcher.cu.
Launcher& cuda_launcher();

}  // namespace fusedopt::device
