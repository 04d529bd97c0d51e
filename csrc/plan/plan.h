// The step plan: the one path from an optimizer to a kernel.
//
// A plan is built once for an optimizer's parameters that kernels can update, and holds one table
// for each (device, storage tuple, variant of the rule, host or device scalars): the same launch
// serves all groups and tensors that share these. Each step, `refresh` reads everything that may have
// moved or changed - group values, parameters, gradients, state tensors and step counts - straight
// from the Python objects, in one walk, and either brings the tables up to date or says why the plan no longer fits, having changed
// nothing; then the caller builds a new one. `launch` writes: step counts, version counters, and the
// kernels' results.
//
// The plan keeps Python references to parameters and unpacks them anew each step. It owns no
// at::Tensor and nothing of a gradient or state, so that swapping, moving or freeing tensors behind
// its back works as it does with torch.optim.
#pragma once

#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/registry.h"
#include "cpu/driver.h"
#include "plan/device.h"
#include "plan/dtensor.h"
#include "plan/hyper.h"
#include "plan/onepass.h"

namespace fusedopt {

namespace py = pybind11;

class StepPlan {
 public:
  // `rows` lists (group index, parameter, fresh, first) for the parameters that kernels update, in
  // the order of the groups, each with complete state in `state`; fresh says that the state was
  // created for the step to come, `first` is None or a device's int32 that is 1 until a step took
  // place. `idle` lists the parameters that wait for a first gradient. `launchers` maps device types
  // to capsules with their Launcher; without one, the CPU driver updates what is in memory. Tables
  // that graphs hold go to `captured`. `onepass` is null for steps that update and nothing else. Throws std::invalid_argument for a row that no kernel fits
  // (the caller asks why_not_fused first).
  StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
           const py::list& rows, const py::list& idle, const py::dict& launchers,
           std::shared_ptr<CapturedTables> captured, std::shared_ptr<OnePass> onepass);

  // None when the plan fits and is up to date, else why it no longer fits.
  std::optional<std::string> refresh(const py::list& param_groups, const py::dict& state,
                                     Purpose purpose);

  // Performs the step that the last `refresh` prepared. `amp` is given where `on_device`. Throws
  // std::runtime_error, before anything is written, for what cannot be captured in a graph.
  void launch(const AmpTensors& amp);

  // The same with what `onepass` asks for, whatever the purpose. `reduce` is called with the specs
  // of DTensors and with as many rows of sums, which it adds up over the ranks. Returns false where
  // the host knows that the step was skipped.
  bool launch(const AmpTensors& amp, const Micro& micro, const py::object& reduce);

  // Whether all scalars are computed on devices, which then read AMP's tensors themselves.
  bool on_device() const;

  // One dict a table: device, storage, variant, rows, slots, where its scalars are computed.
  py::list describe() const;

 private:
  struct Group {
    std::vector<PyObject*> members;  // of group["params"], in order, fused or not
    GroupValues values;
    SeenGroup seen;
    LiveTensors live = LiveTensors::kNone;
    bool on_host = false;  // the CPU driver has rows of it
    int variant = 0;
  };

  // What an entry of a parameter's state dict is to the plan.
  enum : int { kIgnored = -1, kStep = kMaxRowStates, kRoles };
  struct StateKey {
    py::object name;
    int role;  // a place in Row::state, kStep or kIgnored
  };
  using Schema = std::vector<StateKey>;  // a state dict's keys, in order

  // The host's side of a row. Sizes and strides are offsets into `dims_`. What a step finds stands
  // here from `refresh` to `launch` only; between steps these pointers may dangle.
  struct HostRow {
    py::object param;
    c10::TensorImpl* impl = nullptr;
    c10::TensorImpl* grad = nullptr;
    c10::TensorImpl* states[kRoles] = {};
    void* step_at = nullptr;
    double step = 0;   // after this step, where it is counted on the host
    at::Tensor first;  // on the device, 1 until a step took place; may be undefined
    int group;
    int table;
    int row;
    int schema = -1;
    int wrapping = -1;  // where its parameter is a DTensor: index in `wrappings_`
    uint32_t sizes, param_strides, grad_strides, state_strides[kMaxRowStates];
    int8_t param_type, grad_type, state_types[kMaxRowStates];  // at::ScalarType
    uint8_t ndim;
    uint8_t roles = 0;  // which of `states` the row has, as bits
    bool step_is_double = false;
    bool step_on_device = false;
    bool active = false;
    bool copy_on_write = false;
    bool fresh = false;  // the state was created for the row's first step, still to come
    OnePass::Member* member = nullptr;  // null without `onepass_`
    int segment = 0;                    // of the sums of its side's norm

    bool has(int role) const { return ((roles >> role) & 1) != 0; }
  };

  // The outside of a row whose parameter and states are DTensors; the row has their local tensors.
  struct Wrapping {
    int row;
    c10::TensorImpl* param = nullptr;
    c10::TensorImpl* states[kMaxRowStates] = {};
    // Specs that were found to cut the tensors alike; whoever has one of them needs no comparison.
    py::object param_spec = {}, grad_spec = {}, state_specs[kMaxRowStates] = {};
  };

  struct SlotKey {
    int group;
    double step;
    bool first;
    bool operator==(const SlotKey&) const = default;
  };

  struct Launch {
    int variant;
    c10::Device device;
    c10::DispatchKeySet plain_keys;
    std::unique_ptr<TableOnDevice> on_device;  // null: the CPU driver's
    Table table;

    bool has_device_scalars() const {
      return on_device != nullptr && on_device->scalars() == cuda::Scalars::kDevice;
    }
    std::vector<SlotKey> slot_keys;
    std::vector<int> next_of_group;  // by slot, the one before it of the same group; -1: none
    std::vector<int> last_of_group;  // by group, where these chains begin
    std::vector<int> renamed;  // the slot of this step that rows of a slot of the last one went to
  };

  // A device of the plan's, and the blocks that its norm is summed in: those of rows that are
  // distributed alike follow each other, in the order of the parameters.
  struct Side {
    c10::Device device;
    cuda::Launcher* launcher;       // null: the CPU driver
    std::vector<py::object> specs;  // by segment; null for plain tensors
    std::vector<int64_t> ends;      // by segment, one past its last block
    at::Tensor blocks;              // NormSums, as bytes

    int64_t block_count() const { return ends.back(); }
  };

  struct StateEntry {
    PyObject* key;
    int row;  // -1: not a row's
  };

  void add_row(int group, const py::object& param, const py::dict& state, HostRow host);
  int schema_for(const py::dict& state, const StateNames& names);
  cuda::Launcher* launcher_for(c10::Device device) const;
  int table_for(StorageTuple storage, int variant, c10::Device device, cuda::Scalars scalars);
  uint32_t remember(c10::IntArrayRef dims);
  bool fits(const c10::TensorImpl& tensor, int8_t type, const HostRow& row, uint32_t strides) const;
  GroupValues read_group(const Group& group, const py::dict& dict) const;
  const char* refresh_groups(const py::list& param_groups);
  const char* refresh_entries(PyObject* state);
  const char* refresh_wrapping(Wrapping& wrapping);
  PyObject* unwrapped_state(const HostRow& host, int role, PyObject* state);
  const char* refresh_rows(size_t begin, size_t end);
  static bool find_state_tensors(const Schema& schema, PyObject* state, PyObject** objects);
  const char* refresh_row(HostRow& host);
  void assign_blocks();
  void materialize(HostRow& host);
  void assign_slots();
  int slot_for(Launch& launch, const HostRow& host, int previous);

  void check_capture(const Launch& launch) const;
  DeviceNumbers device_numbers(const Launch& launch, const AmpTensors& amp) const;
  std::vector<Board> boards(const std::vector<DeviceNumbers>& numbers,
                            const std::vector<bool>& captures);
  std::vector<bool> ready();
  void measure(const std::vector<Board>& boards, const std::vector<Question>& questions,
               const py::object& reduce);
  void measure_apart(const std::vector<Board>& boards, const std::vector<Question>& questions,
                     const py::object& reduce);
  void run_norms(const Side& side, const Question& question) const;
  void launch_norms(const Side& side, const std::vector<Board>& boards, const Question& question,
                    cuda::Measure measure);
  Question question_for(const Side& side, const AmpTensors& amp, const Micro& micro,
                        std::vector<at::Tensor>& kept) const;
  std::vector<Work> host_work(const Pass& pass) const;
  void empty_window(bool zero_grads);
  void drop_grads();
  void commit_accumulation();
  void commit(size_t begin, size_t end);

  const RuleInfo& rule_;
  GroupReader reader_;
  py::dict launchers_;
  std::shared_ptr<CapturedTables> captured_;
  std::shared_ptr<OnePass> onepass_;
  Purpose purpose_ = Purpose::kUpdate;  // of the last `refresh`
  c10::DispatchKeySet host_keys_;       // of a plain tensor in memory
  std::vector<Group> groups_;
  std::vector<Schema> schemas_;
  std::vector<HostRow> rows_;
  std::vector<Wrapping> wrappings_;
  std::vector<PyObject*> state_dicts_;  // a row's entry of optimizer.state; null when it has none
  std::vector<PyObject*> idle_;
  std::vector<StateEntry> entries_;
  std::vector<int64_t> dims_;
  std::vector<Launch> launches_;
  std::vector<Side> sides_;  // without `onepass_`, none
};

}  // namespace fusedopt
