#include "plan/plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "cpu/driver.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

StepPlan::StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
                   const py::list& rows, const py::list& idle, const py::dict& launchers,
                   std::shared_ptr<CapturedTables> captured)
    : rule_(find_rule(rule)),
      reader_(rule_),
      launchers_(launchers),
      captured_(std::move(captured)),
      host_keys_(plain_keys(at::kCPU)) {
  for (const py::handle group : param_groups) {
    Group& info = groups_.emplace_back();
    for (const py::handle member : group["params"]) info.members.push_back(member.ptr());
  }
  for (const py::handle row : rows) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(row);
    Group& group = groups_[tuple[0].cast<int>()];
    const c10::Device device = THPVariable_Unpack(py::object(tuple[1]).ptr()).device();
    if (launcher_for(device) == nullptr) {
      group.on_host = true;
    } else {
      group.live = device.is_cpu() ? LiveTensors::kAll : LiveTensors::kOffHost;
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    groups_[g].values = read_group(groups_[g], py::reinterpret_borrow<py::dict>(param_groups[g]));
    groups_[g].variant = rule_.variant(groups_[g].values.hyper);
  }
  for (const py::handle param : idle) idle_.push_back(param.ptr());
  rows_.reserve(rows.size());
  for (const py::handle row : rows) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(row);
    HostRow host;
    host.fresh = tuple[2].cast<bool>();
    if (!tuple[3].is_none()) host.first = THPVariable_Unpack(py::object(tuple[3]).ptr());
    add_row(tuple[0].cast<int>(), tuple[1], state, std::move(host));
  }
  for (Launch& launch : launches_) {
    if (launch.on_device == nullptr) launch.table.cut(kCpuChunkElements);
  }

  state_dicts_.resize(rows_.size());
  // The order in which `refresh` will meet the rows when it walks the state.
  std::unordered_map<PyObject*, int> row_of;
  for (size_t r = 0; r < rows_.size(); ++r) row_of.emplace(rows_[r].param.ptr(), int(r));
  for (const auto& [key, value] : state) {
    const auto found = row_of.find(key.ptr());
    const bool has_schema = found != row_of.end() && rows_[found->second].schema >= 0;
    entries_.push_back({key.ptr(), has_schema ? found->second : -1});
  }
}

cuda::Launcher* StepPlan::launcher_for(c10::Device device) const {
  const std::string type = c10::DeviceTypeName(device.type(), /*lower_case=*/true);
  if (!launchers_.contains(type.c_str())) return nullptr;
  return launchers_[type.c_str()].cast<py::capsule>().get_pointer<cuda::Launcher>();
}

GroupValues StepPlan::read_group(const Group& group, const py::dict& dict) const {
  GroupValues values = reader_.read(dict, group.live);
  if (group.on_host) {  // rows on both sides: the host needs the numbers too, and waits for them
    for (int k = 0; k < kMaxHyper; ++k) {
      if (values.live[k].defined()) values.hyper.values[k] = values.live[k].item().toDouble();
    }
  }
  return values;
}

void StepPlan::add_row(int group, const py::object& param, const py::dict& state, HostRow host) {
  const Local local = local_of(param.ptr());
  const at::Tensor& tensor = THPVariable_Unpack(local.tensor);
  const py::object grad_or_none = param.attr("grad");
  const Local local_grad = grad_or_none.is_none() ? local : local_of(grad_or_none.ptr());
  const at::Tensor& grad = THPVariable_Unpack(local_grad.tensor);
  Wrapping wrapping{static_cast<int>(rows_.size())};
  const StateNames names = rule_.states(groups_[group].variant);
  std::vector<at::Tensor> arrays = {tensor, grad};
  const GroupValues& values = groups_[group].values;
  bool device_scalars = (values.route_flags & (kCapturable | kFused)) != 0;
  for (const at::Tensor& live : values.live) device_scalars = device_scalars || live.defined();
  if (names.count > 0 || rule_.has_step) {
    const auto entry = py::reinterpret_borrow<py::dict>(state[param]);
    for (int k = 0; k < names.count; ++k) {
      const Local local_state = local_of(py::object(entry[names.names[k]]).ptr());
      arrays.push_back(THPVariable_Unpack(local_state.tensor));
      wrapping.state_specs[k] = py::reinterpret_borrow<py::object>(local_state.spec);
    }
    host.schema = schema_for(entry, names);
    host.roles = static_cast<uint8_t>((1u << names.count) - 1);
    if (rule_.has_step) {
      host.roles |= 1u << kStep;
      const at::Tensor& step = THPVariable_Unpack(py::object(entry["step"]).ptr());
      // Where a device's memory is the host's, the flags say whose count it is, as torch has it.
      const bool counts_there = (values.route_flags & (kCapturable | kFused)) != 0;
      host.step_on_device = launcher_for(tensor.device()) != nullptr &&
                            step.device() == tensor.device() && (!step.is_cpu() || counts_there);
      device_scalars = device_scalars || host.step_on_device;
    }
  }
  const at::Tensor& first_state = names.count > 0 ? arrays[2] : tensor;
  const StorageTuple storage{*storage_dtype(tensor), *storage_dtype(grad),
                             *storage_dtype(first_state)};
  if (storage_index(storage) < 0) {
    throw std::invalid_argument("no kernel is built for this combination of dtypes");
  }

  host.param = param;
  host.group = group;
  host.table = table_for(storage, groups_[group].variant, tensor.device(),
                         device_scalars ? cuda::Scalars::kDevice : cuda::Scalars::kHost);
  host.ndim = static_cast<uint8_t>(tensor.dim());
  host.param_type = static_cast<int8_t>(tensor.scalar_type());
  host.grad_type = static_cast<int8_t>(grad.scalar_type());
  host.state_type = static_cast<int8_t>(first_state.scalar_type());
  host.sizes = remember(tensor.sizes());
  host.param_strides = remember(tensor.strides());
  const auto strides_of = [&](const at::Tensor& array) {
    return array.strides() == tensor.strides() ? host.param_strides : remember(array.strides());
  };
  host.grad_strides = strides_of(grad);
  for (int k = 0; k < names.count; ++k) host.state_strides[k] = strides_of(arrays[2 + k]);

  Table& table = launches_[host.table].table;
  host.row = static_cast<int>(table.rows.size());
  Row& row = table.rows.emplace_back();
  if (launches_[host.table].has_device_scalars()) row.slot = host.row;
  row.numel = tensor.numel() * components(tensor);
  if (auto layout = strided_layout(arrays)) {
    row.layout = static_cast<int32_t>(table.layouts.size());
    table.layouts.push_back(std::move(*layout));
  }
  if (local.spec != nullptr) {
    wrapping.param_spec = py::reinterpret_borrow<py::object>(local.spec);
    wrapping.grad_spec = py::reinterpret_borrow<py::object>(local_grad.spec);
    host.wrapping = static_cast<int>(wrappings_.size());
    wrappings_.push_back(std::move(wrapping));
  }
  rows_.push_back(std::move(host));
}

int StepPlan::table_for(StorageTuple storage, int variant, c10::Device device,
                        cuda::Scalars scalars) {
  cuda::Launcher* launcher = launcher_for(device);
  const bool on_device = launcher != nullptr && scalars == cuda::Scalars::kDevice;
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Launch& launch = launches_[i];
    if (launch.variant == variant && launch.table.storage == storage && launch.device == device &&
        launch.has_device_scalars() == on_device) {
      return static_cast<int>(i);
    }
  }
  Launch& launch = launches_.emplace_back(variant, device, plain_keys(device.type()));
  if (launcher != nullptr) {
    launch.on_device = std::make_unique<TableOnDevice>(*launcher, device, &rule_, variant, storage,
                                                       scalars, groups_.size());
  }
  launch.table.storage = storage;
  launch.table.states = rule_.states(variant).count;
  launch.table.slot_size = rule_.slot_size(storage.param);
  return static_cast<int>(launches_.size()) - 1;
}

int StepPlan::schema_for(const py::dict& state, const StateNames& names) {
  Schema schema;
  for (const auto& [key, value] : state) {
    const auto name = py::reinterpret_borrow<py::object>(key);
    int role = kIgnored;
    if (rule_.has_step && name.equal(py::str("step"))) role = kStep;
    for (int k = 0; k < names.count; ++k) {
      if (name.equal(py::str(names.names[k]))) role = k;
    }
    schema.push_back({name, role});
  }
  for (size_t s = 0; s < schemas_.size(); ++s) {
    bool same = schemas_[s].size() == schema.size();
    for (size_t k = 0; same && k < schema.size(); ++k) {
      same = schemas_[s][k].role == schema[k].role && schemas_[s][k].name.is(schema[k].name);
    }
    if (same) return static_cast<int>(s);
  }
  schemas_.push_back(std::move(schema));
  return static_cast<int>(schemas_.size()) - 1;
}

uint32_t StepPlan::remember(c10::IntArrayRef dims) {
  const auto at = static_cast<uint32_t>(dims_.size());
  dims_.insert(dims_.end(), dims.begin(), dims.end());
  return at;
}

bool StepPlan::on_device() const {
  return std::all_of(launches_.begin(), launches_.end(),
                     [](const Launch& launch) { return launch.has_device_scalars(); });
}

void StepPlan::check_capture(const Launch& launch) const {
  for (const HostRow& host : rows_) {
    if (&launches_[host.table] != &launch || !host.active) continue;
    if (host.has(kStep) && !host.step_on_device) {
      throw std::runtime_error(
          "step() cannot be captured in a CUDA graph: capturable=False, and the step counts are on "
          "the host; construct the optimizer with capturable=True");
    }
    if (host.fresh) {
      throw std::runtime_error(
          "step() cannot be captured in a CUDA graph: this would be a parameter's first step, and "
          "every replay would start anew; take a step before capturing");
    }
  }
}

DeviceNumbers StepPlan::device_numbers(const Launch& launch, const AmpTensors& amp) const {
  DeviceNumbers numbers;
  for (const Group& group : groups_) {
    numbers.hypers.push_back(device_hyper(group.values, launch.device, numbers.kept));
  }
  numbers.scaler = device_scaler(amp, launch.device, numbers.kept);
  numbers.prepare.assign(launch.table.rows.size(), cuda::PrepareSlot{{}, 0, nullptr, 0, -1});
  for (const HostRow& host : rows_) {
    if (&launches_[host.table] != &launch || !host.active) continue;
    cuda::PrepareSlot& slot = numbers.prepare[host.row];
    slot.hyper = host.group;
    slot.host_step = host.step;
    slot.host_first = host.fresh ? 1 : 0;
    if (host.step_on_device) slot.step = {host.step_at, host.step_is_double ? 1 : 0};
    if (host.first.defined()) {
      slot.first = host.first.mutable_data_ptr<int32_t>();
      numbers.kept.push_back(host.first);
    }
  }
  return numbers;
}

void StepPlan::launch(const AmpTensors& amp) {
  std::vector<const Launch*> captures;
  for (const Launch& launch : launches_) {
    if (launch.on_device == nullptr) continue;
    if (!launch.on_device->capturing()) {
      launch.on_device->ready(launch.table);
      continue;
    }
    check_capture(launch);
    captures.push_back(&launch);
  }
  const Tier& tier = current_tier();
  std::vector<Work> work;
  for (const Launch& launch : launches_) {
    if (launch.on_device == nullptr) {
      const int storage = storage_index(launch.table.storage);
      work.push_back({&launch.table, tier.kernel(rule_.index, launch.variant, storage)});
      continue;
    }
    DeviceNumbers numbers;
    const bool captured = std::find(captures.begin(), captures.end(), &launch) != captures.end();
    if (captured || launch.has_device_scalars()) numbers = device_numbers(launch, amp);
    if (!captured) {
      launch.on_device->step(launch.table, numbers);
      continue;
    }
    Table table = launch.table;  // with a slot a row, whatever the plan's own has
    std::vector<int> variants;
    for (const Group& group : groups_) variants.push_back(group.variant);
    for (size_t r = 0; r < table.rows.size(); ++r) table.rows[r].slot = static_cast<int32_t>(r);
    launch.on_device->capture(table, numbers, variants, *captured_);
  }
  const py::gil_scoped_release no_gil;
  for_blocks(rows_.size(), [this](size_t begin, size_t end) { commit(begin, end); });
  if (!work.empty()) run_tables(work, run_on_torch_pool);
}

void StepPlan::commit(size_t begin, size_t end) {
  // A version counter is bumped by a locked instruction, which waits for its cache miss and holds up
  // all that follow. Plain reads first: their misses overlap.
  for (size_t r = begin; r < end; ++r) {
    const HostRow& host = rows_[r];
    if (!host.active) continue;
    host.impl->version_counter().current_version();
    for (int k = 0; k <= kMaxStates; ++k) {
      if (host.has(k)) host.states[k]->version_counter().current_version();
    }
  }
  for (size_t r = begin; r < end; ++r) {
    HostRow& host = rows_[r];
    if (!host.active) continue;
    host.fresh = false;
    // Of a DTensor torch bumps the outside alone: a view made by to_local() outlives a step.
    const Wrapping* wrapping = host.wrapping < 0 ? nullptr : &wrappings_[host.wrapping];
    (wrapping != nullptr ? wrapping->param : host.impl)->bump_version();
    for (int k = 0; k <= kMaxStates; ++k) {
      if (!host.has(k)) continue;
      const bool wrapped = wrapping != nullptr && k != kStep;
      (wrapped ? wrapping->states[k] : host.states[k])->bump_version();
    }
    if (!host.has(kStep) || host.step_on_device) continue;
    if (host.step_is_double) {
      *static_cast<double*>(host.step_at) = host.step;
    } else {
      *static_cast<float*>(host.step_at) = static_cast<float>(host.step);
    }
  }
}

py::list StepPlan::describe() const {
  py::list tables;
  for (const Launch& launch : launches_) {
    const Table& table = launch.table;
    py::dict entry;
    entry["device"] = launch.device.str();
    entry["storage"] =
        py::make_tuple(dtype_name(table.storage.param), dtype_name(table.storage.grad),
                       dtype_name(table.storage.state));
    entry["variant"] = launch.variant;
    entry["rows"] = table.rows.size();
    entry["strided_rows"] = table.layouts.size();
    entry["chunks"] = launch.on_device != nullptr ? launch.on_device->chunks()
                                                  : static_cast<int64_t>(table.chunks.size());
    entry["slots"] = launch.has_device_scalars() ? table.rows.size() : launch.slot_keys.size();
    entry["device_scalars"] = launch.has_device_scalars();
    tables.append(entry);
  }
  return tables;
}

}  // namespace fusedopt
