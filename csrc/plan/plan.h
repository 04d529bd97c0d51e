// The step plan: the one path from an optimizer to a kernel.
//
// A plan is built once for an optimizer's parameters that kernels can update, and holds one table
// for each (device, storage tuple, variant of the rule, host or device scalars): the same launch
// serves all groups and tensors that share these. A step reads everything that may have moved or
// changed straight from the Python objects, in one walk (walk.cpp), and either says why the plan no
// longer fits, having changed nothing, or writes (step.cpp): step counts, version counters, and the
// kernels' results.
//
// The plan keeps Python references to parameters and unpacks them anew each step. It owns no
// at::Tensor and nothing of a gradient or state, so that swapping, moving or freeing tensors behind
// its back works as it does with torch.optim.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/driver.h"
#include "plan/rows.h"

namespace fusedopt {

// What a step is asked for; nothing, by default: it updates all rows from their gradients.
struct StepRequest {
  Purpose purpose = Purpose::kUpdate;
  std::optional<std::vector<int>> rows;  // those that take part; none: all
  // The step is a further part of the last one, over other rows: it obeys the decision made there.
  bool follows = false;
  double weight = 1.0;     // of these gradients in their window
  at::Tensor live_weight;  // instead of it; may be undefined
  AmpTensors amp;          // for plans that have a memory
  // Called once the plan is known to fit, before anything is written.
  std::optional<py::object> before;
};

// A device of the plan's, and the blocks that its norm is summed in: those of rows that are
// distributed alike follow each other, in the order of the parameters.
struct NormDomain {
  c10::Device device;
  device::Launcher* launcher;     // null: the CPU driver
  StorageTuple storage;           // of its first table
  std::vector<py::object> specs;  // by segment; null for plain tensors
  std::vector<int64_t> ends;      // by segment, one past its last block
  at::Tensor blocks;              // NormSums, as bytes

  int64_t block_count() const { return ends.back(); }
};

// The name of the Python capsules that launchers are in.
constexpr const char* kLauncherCapsule = "fusedopt.Launcher";

// Parameters and the index of their group; by type of device, what launches kernels there.
using PlacedParams = std::vector<std::pair<size_t, py::object>>;
using Launchers = std::map<std::string, py::capsule>;

class StepPlan {
 public:
  // `rows` lists (group index, parameter) for the parameters that kernels update, in the order of
  // the groups, each with complete state in `state`; `new_states` says that some was created for the
  // step to come. `idle` lists the parameters that wait for a first gradient. `launchers` maps device types
  // to capsules of a Launcher; without one, the CPU driver updates what is in memory. Tables
  // that graphs hold go to `captured`. `memory` is null for steps that update and nothing else.
  // Throws std::invalid_argument for a row that no kernel fits (the caller asks why_not_fused first).
  StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
           const PlacedParams& rows, std::vector<py::object> idle, const Launchers& launchers,
           std::shared_ptr<CapturedTables> captured, std::shared_ptr<StepMemory> memory,
           bool new_states);

  // Why the plan no longer fits such a step; none if it does. Nothing is changed.
  std::optional<std::string> why_not(const py::list& param_groups, const py::dict& state,
                                     const StepRequest& request);

  // Takes a step. A string says why the plan no longer fits, and nothing was changed; false, that
  // the host knows of a skip. Throws std::runtime_error, before anything is written, for what cannot
  // be captured in a graph.
  std::variant<bool, std::string> step(const py::list& param_groups, const py::dict& state,
                                       const StepRequest& request);

  // One dict a table: device, storage, variant, rows, slots, where its scalars are computed.
  py::list describe() const;

 private:
  // What a table's launches on a device are given. Empty for a table of the CPU driver's.
  struct DeviceLaunch {
    bool captures = false;  // what is launched is recorded in a graph
    DeviceNumbers numbers;
    UploadedTable uploaded;
  };

  void check(const StepRequest& request) const;
  bool launch(const StepRequest& request);
  bool end_without_rows(const StepRequest& request);
  void decide_without_rows(const StepRequest& request);
  Epilogue epilogue_for(const StepRequest& request, const StepDecision* decision) const;
  void settle_rows();
  int slot_for(TablePlan& plan, const HostRow& host) const;

  std::vector<DeviceLaunch> ready(Purpose purpose);
  void check_capture(const TablePlan& plan, Purpose purpose) const;
  DeviceNumbers device_numbers(const TablePlan& plan) const;
  void upload(std::vector<DeviceLaunch>& launches);

  DecisionInputs inputs_for(c10::Device device, const StepRequest& request,
                            std::vector<at::Tensor>& kept) const;
  bool needs_sums(Purpose purpose) const;
  void decide_all(std::vector<DeviceLaunch>& launches,
                  const std::vector<DecisionInputs>& all_inputs);
  void decide_apart(std::vector<DeviceLaunch>& launches,
                    const std::vector<DecisionInputs>& all_inputs);
  void run_norms(const NormDomain& domain, const DecisionInputs& inputs) const;
  void launch_norms(const NormDomain& domain, const std::vector<DeviceLaunch>& launches,
                    const DecisionInputs& inputs, device::Measure measure);

  std::vector<Work> host_work(bool accumulates, const Epilogue& epilogue) const;
  void clear_host_rows(Purpose purpose);
  void drop_grads();
  void commit_accumulation();
  void commit(size_t begin, size_t end);

  PlanRows rows_;
  std::shared_ptr<CapturedTables> captured_;
  bool new_states_;                  // no step has been taken since they were created
  bool has_devices_ = false;         // some table is not the CPU driver's
  std::vector<NormDomain> domains_;  // without a memory, none
};

}  // namespace fusedopt
