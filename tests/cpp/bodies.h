// The bodies of the CUDA kernels as functions of the host, found as the kernels are.
#pragma once

#include "device/prepare.h"

namespace fusedopt::testing {

using RunChunk = void (*)(const device::DeviceTable& table, const Epilogue& epilogue, int64_t chunk,
                          int thread, int threads);
using RunSlot = void (*)(const device::PrepareTable& table, const StepDecision* decision,
                         int64_t slot);
using RunNorm = void (*)(const device::DeviceTable& table, const DecisionInputs& inputs,
                         const device::Measure& measure, int64_t chunk);
using RunAccumulate = void (*)(const device::DeviceTable& table, const Epilogue& epilogue,
                               int64_t chunk, int thread, int threads);

// An update kernel, for one thread: it clears where the step is skipped.
RunChunk update_of(int rule, int variant, int storage);
RunSlot prepare_of(int rule, bool in_double);
// All lanes of a warp, then the fold that norm.cu does by shuffles.
RunNorm norm_of(DType grad, DType param);
RunAccumulate accumulate_of(DType grad, DType param);

// What the last block of threads does.
void finish_norm(const DecisionInputs& inputs, const device::Measure& measure);

}  // namespace fusedopt::testing
