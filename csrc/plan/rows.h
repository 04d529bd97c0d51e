// What a plan knows of an optimizer: its param groups, and a row for each parameter that kernels
// update. Filled when the plan is built, brought up to date by the walk, read by the step.
#pragma once

#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "core/registry.h"
#include "plan/device.h"
#include "plan/dtensor.h"
#include "plan/hyper.h"
#include "plan/memory.h"

namespace fusedopt {

namespace py = pybind11;

struct Group {
  std::vector<PyObject*> members;  // of group["params"], in order, fused or not
  GroupValues values;
  SeenGroup seen;
  LiveTensors live = LiveTensors::kNone;
  bool on_host = false;  // the CPU driver has rows of it
  GroupFlags flags;
};

// What an entry of a parameter's state dict is to the plan.
enum : int { kIgnored = -1, kScalar = kMaxRowStates, kRoles = kScalar + kMaxScalarStates };
struct StateKey {
  py::object name;
  int role;  // a place in Row::state, kScalar + a scalar state's place, or kIgnored
};
using Schema = std::vector<StateKey>;  // a state dict's keys, in order

// The host's side of a row. Sizes and strides are offsets into `PlanRows::dims`. What the walk finds
// stands here until the step has ended; between steps these pointers may dangle.
struct HostRow {
  py::object param;
  c10::TensorImpl* impl = nullptr;
  c10::TensorImpl* grad = nullptr;
  c10::TensorImpl* states[kRoles] = {};
  double scalars[kMaxScalarStates] = {};  // before the step, where the host advances them
  void* scalar_at[kMaxScalarStates] = {};
  int group;
  int table;
  int row;
  int schema = -1;
  int wrapping = -1;  // where its parameter is a DTensor: index in `PlanRows::wrappings`
  uint32_t sizes, param_strides, grad_strides, state_strides[kMaxRowStates];
  int8_t param_type, grad_type, state_types[kMaxRowStates];  // at::ScalarType
  uint8_t ndim;
  uint8_t roles = 0;      // which of `states` the row has, as bits
  uint8_t doubles = 0;    // which of its scalar states are, as bits
  uint8_t on_device = 0;  // which a device advances, as bits
  bool active = false;
  bool copy_on_write = false;
  StepMemory::Member* member = nullptr;  // null without a memory
  int segment = 0;                       // of the sums of its device's norm
  int slot = 0;                          // place of its SlotKey

  bool has(int role) const { return ((roles >> role) & 1) != 0; }
  bool has_scalar(int k) const { return has(kScalar + k); }
  bool is_double(int k) const { return ((doubles >> k) & 1) != 0; }
  bool advances_there(int k) const { return ((on_device >> k) & 1) != 0; }
  // Whether the host advances a scalar state of the row.
  bool advances_here() const { return (roles >> kScalar & ~on_device) != 0; }
};

// The outside of a row whose parameter and states are DTensors; the row has their local tensors.
struct Wrapping {
  int row;
  c10::TensorImpl* param = nullptr;
  c10::TensorImpl* states[kMaxRowStates] = {};
  // Specs that were found to cut the tensors alike; whoever has one of them needs no comparison.
  py::object param_spec = {}, grad_spec = {}, state_specs[kMaxRowStates] = {};
};

// Rows with the same key share their scalars.
struct SlotKey {
  int group;
  std::array<double, kMaxScalarStates> scalars;
  bool operator==(const SlotKey&) const = default;
};

// A table, and who launches on it.
struct TablePlan {
  int variant;
  c10::Device device;
  c10::DispatchKeySet plain_keys;
  std::unique_ptr<TableOnDevice> on_device;  // null: the CPU driver's
  Table table;
  std::vector<SlotKey> slot_keys;
  std::vector<std::array<double, kMaxScalarStates>> advanced;  // a slot's scalar states afterwards

  bool has_device_scalars() const {
    return on_device != nullptr && on_device->scalars() == device::Scalars::kDevice;
  }
};

struct PlanRows {
  struct StateEntry {
    PyObject* key;
    int row;  // -1: not a row's
  };

  PlanRows(const RuleInfo& rule, std::shared_ptr<StepMemory> memory);

  const RuleInfo& rule;
  GroupReader reader;
  std::shared_ptr<StepMemory> memory;  // null for steps that update and nothing else
  StepOptions options;                 // the memory's when the plan was built
  c10::DispatchKeySet host_keys;       // of a plain tensor in memory
  std::vector<Group> groups;
  std::vector<Schema> schemas;
  std::vector<HostRow> rows;
  std::vector<int> all;    // the index of every row
  std::vector<int> named;  // those of the last step that named its rows
  bool names = false;      // the present step does
  std::vector<Wrapping> wrappings;
  std::vector<PyObject*> state_dicts;  // a row's entry of optimizer.state; null when it has none
  std::vector<py::object> idle;        // parameters that wait for a first gradient
  std::vector<StateEntry> entries;     // of optimizer.state, in order
  std::vector<int64_t> dims;
  std::vector<TablePlan> tables;

  TablePlan& table_of(const HostRow& host) { return tables[host.table]; }
  const TablePlan& table_of(const HostRow& host) const { return tables[host.table]; }
  Row& row_of(const HostRow& host) { return tables[host.table].table.rows[host.row]; }
  // The tensor whose gradient and version are the parameter's: of a DTensor its outside.
  c10::TensorImpl* outside(const HostRow& host) const {
    return host.wrapping < 0 ? host.impl : wrappings[host.wrapping].param;
  }
  c10::TensorImpl* outside(const HostRow& host, int role) const {
    const bool wrapped = host.wrapping >= 0 && role < kScalar;
    return wrapped ? wrappings[host.wrapping].states[role] : host.states[role];
  }

  // The rows of the present step.
  const std::vector<int>& present() const { return names ? named : all; }
  // Makes them those of a step to come.
  void select(const std::optional<std::vector<int>>& rows);

  // Whether options have changed for which rows, tables or sums are laid out.
  bool has_other_options() const;
  bool zeroes_grads() const { return memory != nullptr && memory->options.zero_grads; }
  GroupValues read_group(const Group& group, const py::dict& dict) const;
};

// What a walk says of a flush that meets a gradient which is in no accumulator.
constexpr const char* kUnseenGradient = "a gradient was not accumulated";

// What a step says, of any plan, under a TorchDispatchMode, which is to see every operation.
constexpr const char* kIntercepted =
    "a TorchDispatchMode is active, which would not see what kernels do";

// Reads everything that may have moved or changed since the last step, for the present rows: the
// values of groups, parameters, gradients, state tensors and step counts. Null if the plan fits, and
// is up to date then; otherwise why not.
const char* walk(PlanRows& plan, const py::list& param_groups, const py::dict& state,
                 Purpose purpose);

}  // namespace fusedopt
