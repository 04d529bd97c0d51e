// One step of one rule on one fp32 tensor, without torch, for Python's ctypes. It is what csrc/plan
// does for all tensors of all groups: a row of a table, a slot with the step's scalars, the driver.
#include <algorithm>

#include "core/registry.h"
#include "cpu/driver.h"

using namespace fusedopt;

extern "C" __attribute__((visibility("default"))) void step(const char* rule, const double* hyper,
                                                            int64_t step, float* param, float* grad,
                                                            float** states, int64_t numel) {
  const RuleInfo& info = find_rule(rule);
  HyperValues values;
  std::copy_n(hyper, info.hyper_names.size(), values.values);
  const int variant = info.variant(values);

  Table table;
  table.storage = {DType::kF32, DType::kF32, DType::kF32};
  table.states = info.states(variant).count;
  table.slot_size = info.slot_size(DType::kF32);
  table.slots.resize(static_cast<size_t>(table.slot_size));
  double scalar_states[kMaxScalarStates] = {static_cast<double>(step - 1)};
  info.write_slot(DType::kF32, values, scalar_states, 1.0, table.slots.data());
  Row row;
  row.param = param;
  row.grad = grad;
  std::copy_n(states, table.states, row.state);
  row.numel = numel;
  table.rows.push_back(row);
  table.cut(kCpuChunkElements);

  const Kernel kernel = current_tier().kernel(info.index, variant, storage_index(table.storage));
  run_tables({{&table, kernel}}, [](const std::function<void()>& worker) { worker(); });
}
