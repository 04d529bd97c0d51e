#include "plan/triton.h"

#include <algorithm>
#include <bit>
#include <cstddef>

namespace fusedopt {

namespace {

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Kernels take integers alone; they make a double of its bits.
int64_t bits(double value) { return std::bit_cast<int64_t>(value); }

}  // namespace

template <class... Arguments>
device::Status TritonLauncher::launch(const char* kind, const pybind11::tuple& key, int64_t count,
                                      device::Stream stream, const Arguments&... arguments) {
  kernels_.attr("launch")(kind, key, count, address(stream), arguments...);
  return nullptr;
}

int TritonLauncher::multiprocessors() {
  return std::max(kernels_.attr("multiprocessors")().cast<int>(), 1);
}

device::Status TritonLauncher::load(const StorageTuple& storage, int rule, int variant) {
  kernels_.attr("load")(rule, variant, int(storage.param), int(storage.grad), int(storage.state));
  return nullptr;
}

device::Status TritonLauncher::update(const StorageTuple& storage, int rule, int variant,
                                      const device::DeviceTable& table, const Epilogue& epilogue,
                                      device::Stream stream) {
  const auto key = pybind11::make_tuple(rule, variant, int(storage.param), int(storage.grad),
                                        int(storage.state));
  return launch("update", key, table.chunk_count, stream, address(table.rows),
                address(table.chunks), address(table.layouts), address(table.slots),
                table.chunk_count, address(epilogue.decision), epilogue.zero_grads,
                epilogue.write_grads);
}

device::Status TritonLauncher::prepare(int rule, bool in_double, const device::PrepareTable& table,
                                       const StepDecision* decision, device::Stream stream) {
  return launch("prepare", pybind11::make_tuple(rule, in_double), table.slot_count, stream,
                address(table.prepare), address(table.hypers), address(table.slots),
                address(decision));
}

device::Status TritonLauncher::norm(const StorageTuple& storage, const device::DeviceTable& table,
                                    const device::Measure& measure, const DecisionInputs& inputs,
                                    device::Stream stream) {
  return launch("norm", pybind11::make_tuple(int(storage.param), int(storage.grad)),
                table.chunk_count, stream, address(table.rows), address(table.chunks),
                address(table.layouts), table.chunk_count, address(measure.blocks),
                measure.block_count, address(measure.total), address(measure.decision),
                measure.last, measure.decides, int(inputs.purpose), inputs.check, inputs.mean,
                inputs.grads, bits(inputs.max_norm), bits(inputs.weight),
                address(inputs.live_weight), address(inputs.grad_scale), address(inputs.found_inf));
}

device::Status TritonLauncher::accumulate(const StorageTuple& storage,
                                          const device::DeviceTable& table,
                                          const Epilogue& epilogue, device::Stream stream) {
  return launch("accumulate", pybind11::make_tuple(int(storage.param), int(storage.grad)),
                table.chunk_count, stream, address(table.rows), address(table.chunks),
                address(table.layouts), table.chunk_count, address(epilogue.decision),
                epilogue.zero_grads);
}

pybind11::dict layout() {
  using device::DeviceChunk, device::DeviceHyper, device::DeviceLayout, device::DeviceNumber,
      device::DeviceRow, device::PrepareSlot;
  pybind11::dict places;
  const auto set = [&](const char* name, int64_t place) { places[name] = place; };
  set("ACCUMULATOR", 2 + kAccumulator);
  set("AVERAGE", 2 + kAverage);
  set("ACCESS_BYTES", device::kAccessBytes);
  set("ROW_BYTES", sizeof(DeviceRow));
  set("ROW_NORM_BLOCK", offsetof(DeviceRow, norm_block));
  set("ROW_SLOT", offsetof(DeviceRow, slot));
  set("ROW_LAYOUT", offsetof(DeviceRow, layout));
  set("ROW_WIDTH", offsetof(DeviceRow, width));
  set("ROW_HEAD", offsetof(DeviceRow, head));
  set("CHUNK_BYTES", sizeof(DeviceChunk));
  set("CHUNK_COUNT", offsetof(DeviceChunk, count));
  set("CHUNK_ROW", offsetof(DeviceChunk, row));
  set("LAYOUT_BYTES", sizeof(DeviceLayout));
  set("LAYOUT_SIZES", offsetof(DeviceLayout, sizes));
  set("LAYOUT_STRIDES", offsetof(DeviceLayout, strides));
  set("LAYOUT_ARRAY", sizeof(DeviceLayout::strides[0]));
  set("PREPARE_BYTES", sizeof(PrepareSlot));
  set("SCALAR_STATES", kMaxScalarStates);
  set("PREPARE_HYPER", offsetof(PrepareSlot, hyper));
  set("HYPER_BYTES", sizeof(DeviceHyper));
  set("HYPER_GRAD_FACTOR", offsetof(DeviceHyper, grad_factor));
  set("NUMBER_BYTES", sizeof(DeviceNumber));
  set("NUMBER_KIND", offsetof(DeviceNumber, kind));
  set("NUMBER_FLOAT", int(device::NumberKind::kFloat));
  set("NUMBER_DOUBLE", int(device::NumberKind::kDouble));
  set("DECISION_WEIGHT", offsetof(StepDecision, weight));
  set("DECISION_NORM", offsetof(StepDecision, norm));
  set("DECISION_FACTOR64", offsetof(StepDecision, factor64));
  set("DECISION_IN64", offsetof(StepDecision, in64));
  set("DECISION_EMA_DECAY64", offsetof(StepDecision, ema_decay64));
  set("DECISION_EMA_REST64", offsetof(StepDecision, ema_rest64));
  set("DECISION_FACTOR32", offsetof(StepDecision, factor32));
  set("DECISION_IN32", offsetof(StepDecision, in32));
  set("DECISION_EMA_DECAY32", offsetof(StepDecision, ema_decay32));
  set("DECISION_EMA_REST32", offsetof(StepDecision, ema_rest32));
  set("DECISION_NORM32", offsetof(StepDecision, norm32));
  set("DECISION_TAKE", offsetof(StepDecision, take));
  set("DECISION_SKIP", offsetof(StepDecision, skip));
  set("DECISION_TICKET", offsetof(StepDecision, ticket));
  set("NORM_BLOCK", kNormBlock);
  set("NORM_CLASSES", kNormClasses);
  set("SUMS_BYTES", sizeof(NormSums));
  set("ACCUMULATE", int(Purpose::kAccumulate));
  set("CLOSE", int(Purpose::kClose));
  return places;
}

}  // namespace fusedopt
