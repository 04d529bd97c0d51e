// A step: the walk, the decision, the launches, and what they leave behind on the host.
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>

#include "cpu/driver.h"
#include "plan/plan.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

namespace {

StepDecision* decision_at(const at::Tensor& memory) {
  return static_cast<StepDecision*>(memory.data_ptr());
}

NormSums* sums_at(const at::Tensor& memory) { return static_cast<NormSums*>(memory.data_ptr()); }

}  // namespace

std::optional<std::string> StepPlan::why_not(const py::list& param_groups, const py::dict& state,
                                             const StepRequest& request) {
  check(request);
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return kIntercepted;
  rows_.select(request.rows);
  const char* reason = walk(rows_, param_groups, state, request.purpose);
  if (reason == nullptr) return std::nullopt;
  return reason;
}

std::variant<bool, std::string> StepPlan::step(const py::list& param_groups, const py::dict& state,
                                               const StepRequest& request) {
  if (auto reason = why_not(param_groups, state, request)) return *reason;
  if (request.before) (*request.before)();
  return launch(request);
}

// Throws std::invalid_argument for what this plan cannot be asked.
void StepPlan::check(const StepRequest& request) const {
  const StepMemory* memory = rows_.memory.get();
  const bool scaled = request.amp.grad_scale.defined() || request.amp.found_inf.defined();
  if (memory == nullptr && scaled) {
    throw std::invalid_argument("a request of grad_scale or found_inf needs a memory");
  }
  if (request.purpose != Purpose::kUpdate && (memory == nullptr || !memory->options.accumulates)) {
    throw std::invalid_argument("a request to accumulate needs a memory that accumulates");
  }
  if (!request.rows) return;
  for (const int r : *request.rows) {
    if (r < 0 || static_cast<size_t>(r) >= rows_.rows.size()) {
      throw std::invalid_argument("a request is for row " + std::to_string(r) + " of " +
                                  std::to_string(rows_.rows.size()));
    }
  }
}

bool StepPlan::launch(const StepRequest& request) {
  if (rows_.present().empty()) return end_without_rows(request);
  StepMemory* memory = rows_.memory.get();
  const bool accumulates = request.purpose == Purpose::kAccumulate;
  settle_rows();
  std::vector<DeviceLaunch> devices = ready(request.purpose);

  // Kernels on devices read these until they have run.
  std::vector<at::Tensor> kept;
  std::vector<DecisionInputs> all_inputs;
  for (const NormDomain& domain : domains_) {
    all_inputs.push_back(inputs_for(domain.device, request, kept));
    kept.push_back(memory->decision(domain.device));
    kept.push_back(domain.blocks);
  }
  for (size_t i = 0; i < devices.size(); ++i) {
    const TablePlan& plan = rows_.tables[i];
    DeviceNumbers& numbers = devices[i].numbers;
    if (plan.on_device == nullptr) continue;
    if (!accumulates && (devices[i].captures || plan.has_device_scalars())) {
      numbers = device_numbers(plan);
      numbers.kept.insert(numbers.kept.end(), kept.begin(), kept.end());
    }
    if (memory != nullptr) {
      numbers.epilogue = epilogue_for(request, decision_at(memory->decision(plan.device)));
    }
  }
  upload(devices);
  if (memory != nullptr && !request.follows) decide_all(devices, all_inputs);

  for (size_t i = 0; i < devices.size(); ++i) {
    const TablePlan& plan = rows_.tables[i];
    if (plan.on_device == nullptr) continue;
    if (accumulates) {
      plan.on_device->accumulate(devices[i].uploaded, plan.table, devices[i].numbers.epilogue);
    } else {
      plan.on_device->step(devices[i].uploaded, plan.table, devices[i].numbers);
    }
  }
  Epilogue epilogue = epilogue_for(request, nullptr);
  for (const NormDomain& domain : domains_) {
    if (domain.launcher == nullptr)
      epilogue.decision = decision_at(memory->decision(domain.device));
  }
  const bool skips = !accumulates && epilogue.decision != nullptr && epilogue.decision->skip != 0;
  if (skips) {
    clear_host_rows(request.purpose);
  } else {
    const std::vector<Work> work = host_work(accumulates, epilogue);
    const py::gil_scoped_release no_gil;
    if (accumulates) {
      commit_accumulation();
    } else {
      for_blocks(rows_.present().size(), [this](size_t begin, size_t end) { commit(begin, end); });
    }
    if (!work.empty()) run_tables(work, run_on_torch_pool);
  }
  new_states_ = false;
  if (accumulates && !rows_.zeroes_grads()) drop_grads();
  if (closes(request.purpose)) {
    for (const int r : rows_.present()) rows_.rows[r].member->has_accumulated = false;
    if (!rows_.names) memory->end_window();
  }
  return !skips;
}

Epilogue StepPlan::epilogue_for(const StepRequest& request, const StepDecision* decision) const {
  Epilogue epilogue{decision};
  epilogue.zero_grads = rows_.zeroes_grads() ? 1 : 0;
  const bool scaled = rows_.memory != nullptr && rows_.memory->options.scaled;
  epilogue.write_grads = scaled && request.amp.grad_scale.defined() ? 1 : 0;
  return epilogue;
}

// A micro-batch without gradients counts all the same, and ends its window.
bool StepPlan::end_without_rows(const StepRequest& request) {
  StepMemory* memory = rows_.memory.get();
  if (memory == nullptr || request.follows) return true;
  if (memory->options.shared && needs_sums(request.purpose)) {
    decide_without_rows(request);
  } else if (request.purpose == Purpose::kAccumulate) {
    memory->set_window_weight(memory->window_weight() + request.weight);
  } else if (closes(request.purpose)) {
    memory->set_window_weight(0.0);
  }
  return true;
}

// What the other ranks' gradients decide, on a rank that has none.
void StepPlan::decide_without_rows(const StepRequest& request) {
  std::vector<at::Tensor> kept;
  const DecisionInputs inputs = inputs_for(at::kCPU, request, kept);
  const at::Tensor none = at::zeros({1, 2}, at::TensorOptions(at::kDouble));
  py::list specs;
  specs.append(py::none());
  const at::Tensor total = at::cat(rows_.memory->add_up({specs}, {none})).cpu();
  const NormSums sums = sum_blocks(sums_at(total), total.size(0));
  const c10::Device device =
      rows_.idle.empty() ? at::kCPU : THPVariable_Unpack(rows_.idle.front().ptr()).device();
  if (rows_.memory->decisions().empty()) rows_.memory->decision(device);
  rows_.memory->change_decisions([&](StepDecision& decision) { decide(inputs, sums, decision); });
}

// ---- Rows --------------------------------------------------------------------------------------

// Gives the rows that take part their slots, and memory of their own where they write.
void StepPlan::settle_rows() {
  for (TablePlan& plan : rows_.tables) {
    plan.slot_keys.clear();
    plan.advanced.clear();
    plan.table.slots.clear();
  }
  for (const int r : rows_.present()) {
    HostRow& host = rows_.rows[r];
    if (!host.active) continue;
    TablePlan& plan = rows_.table_of(host);
    Row& row = plan.table.rows[host.row];
    if (host.copy_on_write) {
      row.param = host.impl->mutable_data();
      if (host.grad != nullptr) {  // it may have shared the parameter's memory until now
        row.grad =
            rows_.zeroes_grads() ? host.grad->mutable_data() : const_cast<void*>(host.grad->data());
      }
      for (int k = 0; k < kMaxRowStates; ++k) {
        if (row.state[k] != nullptr) row.state[k] = host.states[k]->mutable_data();
      }
      for (int k = 0; k < kMaxScalarStates; ++k) {
        if (host.has_scalar(k)) host.scalar_at[k] = host.states[kScalar + k]->mutable_data();
      }
    }
    const bool prepares = !plan.has_device_scalars();
    if (prepares || host.advances_here()) host.slot = slot_for(plan, host);
    if (prepares) row.slot = host.slot;
  }
}

// The slot of a row, which nearly always has that of the last step again. Two slots may have the same
// key, if the keys of the last step were different.
int StepPlan::slot_for(TablePlan& plan, const HostRow& host) const {
  const SlotKey key{host.group, std::to_array(host.scalars)};
  const int previous = host.slot;
  std::vector<SlotKey>& keys = plan.slot_keys;
  const int count = static_cast<int>(keys.size());
  if (previous < count && keys[previous] == key) return previous;
  if (previous != count) {
    // Rows come in the order of the groups, so the slots of a group follow each other.
    for (int slot = count - 1; slot >= 0 && keys[slot].group == key.group; --slot) {
      if (keys[slot] == key) return slot;
    }
  }
  keys.push_back(key);
  Table& table = plan.table;
  table.slots.resize(keys.size() * table.slot_size);
  const GroupValues& values = rows_.groups[host.group].values;
  rows_.rule.write_slot(table.storage.param, values.hyper,
                        plan.advanced.emplace_back(key.scalars).data(),
                        values.maximize ? -1.0 : 1.0, table.slots.data() + count * table.slot_size);
  return count;
}

// ---- Devices -----------------------------------------------------------------------------------

void StepPlan::check_capture(const TablePlan& plan, Purpose purpose) const {
  for (const int r : rows_.present()) {
    const HostRow& host = rows_.rows[r];
    if (&rows_.table_of(host) != &plan || !host.active) continue;
    const char* reason = nullptr;
    if (host.advances_here()) {
      reason =
          "capturable=False, and the step counts are on the host; construct the optimizer with "
          "capturable=True";
    } else if (purpose != Purpose::kUpdate) {
      reason =
          "gradients are being accumulated, and a replay cannot tell where in its window it is; "
          "capture forward and backward alone";
    } else if (new_states_) {
      reason =
          "this would be a parameter's first step, and every replay would start anew; take a step "
          "before capturing";
    }
    if (reason != nullptr) {
      throw std::runtime_error(std::string("step() cannot be captured in a CUDA graph: ") + reason);
    }
  }
}

// By table; empty if none is on a device. Comes before the first launch: there may be no room for the
// last table's memory.
std::vector<StepPlan::DeviceLaunch> StepPlan::ready(Purpose purpose) {
  std::vector<DeviceLaunch> launches(has_devices_ ? rows_.tables.size() : 0);
  for (size_t i = 0; i < launches.size(); ++i) {
    const TablePlan& plan = rows_.tables[i];
    if (plan.on_device == nullptr) continue;
    launches[i].captures = plan.on_device->capturing();
    if (launches[i].captures) {
      check_capture(plan, purpose);
    } else {
      plan.on_device->ready(plan.table);
    }
  }
  return launches;
}

DeviceNumbers StepPlan::device_numbers(const TablePlan& plan) const {
  DeviceNumbers numbers;
  for (const Group& group : rows_.groups) {
    numbers.hypers.push_back(device_hyper(group.values, plan.device, numbers.kept));
  }
  numbers.prepare.assign(plan.table.rows.size(), device::PrepareSlot{});
  for (const int r : rows_.present()) {
    const HostRow& host = rows_.rows[r];
    if (&rows_.table_of(host) != &plan || !host.active) continue;
    device::PrepareSlot& slot = numbers.prepare[host.row];
    slot.hyper = host.group;
    for (int k = 0; k < kMaxScalarStates; ++k) {
      slot.scalar_states[k] = host.advances_there(k)
                                  ? device::number_at(host.scalar_at[k], host.is_double(k))
                                  : device::number_of(host.scalars[k]);
    }
  }
  return numbers;
}

void StepPlan::upload(std::vector<DeviceLaunch>& launches) {
  for (size_t i = 0; i < launches.size(); ++i) {
    const TablePlan& plan = rows_.tables[i];
    if (plan.on_device == nullptr) continue;
    if (!launches[i].captures) {
      launches[i].uploaded = plan.on_device->upload(plan.table, launches[i].numbers);
      continue;
    }
    Table table = plan.table;  // with a slot a row, whatever the plan's own has
    std::vector<GroupFlags> flags;
    for (const Group& group : rows_.groups) flags.push_back(group.flags);
    for (size_t r = 0; r < table.rows.size(); ++r) table.rows[r].slot = static_cast<int32_t>(r);
    launches[i].uploaded = plan.on_device->capture(table, launches[i].numbers, flags, *captured_);
  }
}

// ---- Decisions ---------------------------------------------------------------------------------

DecisionInputs StepPlan::inputs_for(c10::Device device, const StepRequest& request,
                                    std::vector<at::Tensor>& kept) const {
  const StepOptions& options = rows_.memory->options;
  const bool flushes = request.purpose == Purpose::kFlush;
  DecisionInputs inputs;
  inputs.purpose = flushes ? Purpose::kClose : request.purpose;
  inputs.check = options.check ? 1 : 0;
  inputs.mean = options.mean ? 1 : 0;
  inputs.max_norm = options.max_norm;
  inputs.weight = request.weight;
  inputs.grads = flushes ? 0 : 1;
  if (request.live_weight.defined()) {
    kept.push_back(moved(request.live_weight, device, at::kDouble));
    inputs.live_weight = static_cast<const double*>(kept.back().const_data_ptr());
  }
  inputs.grad_scale = amp_number(request.amp.grad_scale, device, kept);
  inputs.found_inf = amp_number(request.amp.found_inf, device, kept);
  return inputs;
}

// The CPU driver's norms, over all of its tables.
void StepPlan::run_norms(const NormDomain& domain, const DecisionInputs& inputs) const {
  std::vector<Work> work = host_work(false, {});
  for (Work& item : work) {
    item.kind = Work::Kind::kNorm;
    item.kernel = current_tier().norm(item.table->storage.grad, item.table->storage.param);
    item.sums = sums_at(domain.blocks);
    item.in = weight_in(inputs);
  }
  const py::gil_scoped_release no_gil;
  run_tables(work, run_on_torch_pool);
}

// The norm's launches over a device's tables; `measure` is the last one's.
void StepPlan::launch_norms(const NormDomain& domain, const std::vector<DeviceLaunch>& launches,
                            const DecisionInputs& inputs, device::Measure measure) {
  size_t last = 0;
  for (size_t i = 0; i < launches.size(); ++i) {
    if (rows_.tables[i].device == domain.device) last = i;
  }
  for (size_t i = 0; i <= last; ++i) {
    const TablePlan& plan = rows_.tables[i];
    if (plan.device != domain.device) continue;
    device::Measure here = measure;
    if (i != last) here.last = here.decides = 0;
    plan.on_device->norm(launches[i].uploaded, plan.table, {here, inputs});
  }
}

bool StepPlan::needs_sums(Purpose purpose) const {
  const StepOptions& options = rows_.memory->options;
  return options.check || (options.measures && purpose != Purpose::kAccumulate);
}

// Fills every device's decision: from the norm of all rows, where it is asked for.
void StepPlan::decide_all(std::vector<DeviceLaunch>& launches,
                          const std::vector<DecisionInputs>& all_inputs) {
  const bool sums = needs_sums(all_inputs[0].purpose);
  const bool apart = domains_.size() > 1 || domains_[0].specs.size() > 1 || domains_[0].specs[0] ||
                     rows_.memory->options.shared;
  if (sums && apart) return decide_apart(launches, all_inputs);
  for (size_t d = 0; d < domains_.size(); ++d) {
    const NormDomain& domain = domains_[d];
    StepDecision* decision = decision_at(rows_.memory->decision(domain.device));
    if (domain.launcher == nullptr) {
      NormSums total;
      if (sums) {
        run_norms(domain, all_inputs[d]);
        total = sum_blocks(sums_at(domain.blocks), domain.block_count());
      }
      decide(all_inputs[d], total, *decision);
    } else if (sums) {
      launch_norms(domain, launches, all_inputs[d],
                   {sums_at(domain.blocks), domain.block_count(), nullptr, decision, 1, 1});
    } else {
      finish_norm(*domain.launcher, domain.device, domain.storage,
                  {{nullptr, 0, nullptr, decision, 1, 1}, all_inputs[d]});
    }
  }
}

// The same where sums have to meet: those of several devices, and those of several ranks.
void StepPlan::decide_apart(std::vector<DeviceLaunch>& launches,
                            const std::vector<DecisionInputs>& all_inputs) {
  std::vector<py::list> all_specs;
  std::vector<at::Tensor> totals;
  for (size_t d = 0; d < domains_.size(); ++d) {
    const NormDomain& domain = domains_[d];
    const auto segments = static_cast<int64_t>(domain.specs.size());
    at::Tensor total =
        at::zeros({segments, 2}, at::TensorOptions(at::kDouble).device(domain.device));
    NormSums* blocks = sums_at(domain.blocks);
    if (domain.launcher == nullptr) {
      run_norms(domain, all_inputs[d]);
    } else {
      launch_norms(domain, launches, all_inputs[d], {blocks, 0, nullptr, nullptr, 0, 0});
    }
    StepDecision* decision = decision_at(rows_.memory->decision(domain.device));
    int64_t begin = 0;
    for (int64_t segment = 0; segment < segments; ++segment) {
      const int64_t count = domain.ends[segment] - begin;
      if (domain.launcher == nullptr) {
        sums_at(total)[segment] = sum_blocks(blocks + begin, count);
      } else {
        finish_norm(*domain.launcher, domain.device, domain.storage,
                    {{blocks + begin, count, sums_at(total) + segment, decision, 1, 0}, {}});
      }
      begin = domain.ends[segment];
    }
    py::list& specs = all_specs.emplace_back();
    for (const py::object& spec : domain.specs) specs.append(spec ? spec : py::none());
    totals.push_back(std::move(total));
  }
  totals = rows_.memory->add_up(all_specs, totals);
  for (size_t d = 0; d < domains_.size(); ++d) {
    const NormDomain& domain = domains_[d];
    std::vector<at::Tensor> here;
    for (const at::Tensor& total : totals) {
      here.push_back(moved(total, domain.device, at::kDouble));
    }
    const at::Tensor all = at::cat(here);
    StepDecision* decision = decision_at(rows_.memory->decision(domain.device));
    if (domain.launcher == nullptr) {
      decide(all_inputs[d], sum_blocks(sums_at(all), all.size(0)), *decision);
    } else {
      finish_norm(*domain.launcher, domain.device, domain.storage,
                  {{sums_at(all), all.size(0), nullptr, decision, 1, 1}, all_inputs[d]});
    }
  }
}

// ---- The host ----------------------------------------------------------------------------------

std::vector<Work> StepPlan::host_work(bool accumulates, const Epilogue& epilogue) const {
  const Tier& tier = current_tier();
  std::vector<Work> work;
  for (const TablePlan& plan : rows_.tables) {
    if (plan.on_device != nullptr) continue;
    const StorageTuple& storage = plan.table.storage;
    if (accumulates) {
      const Kernel kernel = tier.accumulate(storage.grad, storage.param);
      work.push_back({&plan.table, kernel, Work::Kind::kAccumulate, epilogue});
    } else {
      const Kernel kernel = tier.kernel(rows_.rule.index, plan.variant, storage_index(storage));
      work.push_back({&plan.table, kernel, Work::Kind::kUpdate, epilogue});
    }
  }
  return work;
}

// What is left of a step that the host skips: the window ends, gradients are cleared if asked to.
void StepPlan::clear_host_rows(Purpose purpose) {
  const auto clear = [](c10::TensorImpl* tensor) {
    at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor)).zero_();
  };
  for (const int r : rows_.present()) {
    HostRow& host = rows_.rows[r];
    if (rows_.table_of(host).on_device != nullptr) continue;
    if (rows_.zeroes_grads() && host.grad != nullptr) clear(host.grad);
    if (closes(purpose) && host.member->has_accumulated) clear(host.states[kAccumulator]);
  }
}

// Gradients that are in the accumulators are freed.
void StepPlan::drop_grads() {
  for (const int r : rows_.present()) {
    HostRow& host = rows_.rows[r];
    if (host.grad == nullptr) continue;
    rows_.outside(host)->mutable_grad().reset();
    host.grad = nullptr;
  }
}

void StepPlan::commit_accumulation() {
  for (const int r : rows_.present()) {
    HostRow& host = rows_.rows[r];
    if (!host.active) continue;
    host.member->has_accumulated = true;
    rows_.outside(host, kAccumulator)->bump_version();
    if (!rows_.zeroes_grads()) continue;
    host.grad->bump_version();
    host.member->zeroed = host.grad;
    host.member->zeroed_version = host.grad->version_counter().current_version();
  }
}

// Counts the step, of the present rows from `begin` to `end`.
void StepPlan::commit(size_t begin, size_t end) {
  const int* present = rows_.present().data();
  // A version counter is bumped by a locked instruction, which waits for its cache miss and holds up
  // all that follow. Plain reads first: their misses overlap.
  for (size_t i = begin; i < end; ++i) {
    const HostRow& host = rows_.rows[present[i]];
    if (!host.active) continue;
    host.impl->version_counter().current_version();
    for (int k = 0; k < kRoles; ++k) {
      if (host.has(k)) host.states[k]->version_counter().current_version();
    }
  }
  const bool zeroes = rows_.zeroes_grads();
  for (size_t i = begin; i < end; ++i) {
    HostRow& host = rows_.rows[present[i]];
    if (!host.active) continue;
    if (zeroes && host.grad != nullptr) host.grad->bump_version();
    // Of a DTensor torch bumps the outside alone: a view made by to_local() outlives a step.
    rows_.outside(host)->bump_version();
    for (int k = 0; k < kRoles; ++k) {
      if (host.has(k)) rows_.outside(host, k)->bump_version();
    }
    if (!host.advances_here()) continue;
    const double* advanced = rows_.table_of(host).advanced[host.slot].data();
    for (int k = 0; k < kMaxScalarStates; ++k) {
      if (!host.has_scalar(k) || host.advances_there(k)) continue;
      if (host.is_double(k)) {
        *static_cast<double*>(host.scalar_at[k]) = advanced[k];
      } else {
        *static_cast<float*>(host.scalar_at[k]) = static_cast<float>(advanced[k]);
      }
    }
  }
}

}  // namespace fusedopt
