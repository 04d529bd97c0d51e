#include "plan/plan.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "plan/tensors.h"

namespace fusedopt {

StepPlan::StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
                   const py::list& rows, const py::list& idle, const py::dict& launchers,
                   std::shared_ptr<CapturedTables> captured, std::shared_ptr<OnePass> onepass)
    : rule_(find_rule(rule)),
      reader_(rule_),
      launchers_(launchers),
      captured_(std::move(captured)),
      onepass_(std::move(onepass)),
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
    HostRow host{};
    host.fresh = tuple[2].cast<bool>();
    if (!tuple[3].is_none()) host.first = THPVariable_Unpack(py::object(tuple[3]).ptr());
    add_row(tuple[0].cast<int>(), tuple[1], state, std::move(host));
  }
  for (Launch& launch : launches_) {
    if (launch.on_device == nullptr) launch.table.cut(kCpuChunkElements);
  }

  if (onepass_ != nullptr) assign_blocks();
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
  // Where a device's memory is the host's, the flags say whose count it is, as torch has it.
  const bool counts_there = (values.route_flags & (kCapturable | kFused)) != 0 ||
                            (onepass_ != nullptr && onepass_->may_skip());
  bool device_scalars = counts_there;
  for (const at::Tensor& live : values.live) device_scalars = device_scalars || live.defined();
  const bool accumulates = onepass_ != nullptr && onepass_->accumulates;
  const bool averages = onepass_ != nullptr && onepass_->averages();
  arrays.resize(kMaxArrays);
  if (names.count > 0 || rule_.has_step || accumulates || averages) {
    const auto entry = py::reinterpret_borrow<py::dict>(state[param]);
    const auto add_state = [&](int role, const char* name) {
      const Local local_state = local_of(py::object(entry[name]).ptr());
      const at::Tensor& here = THPVariable_Unpack(local_state.tensor);
      arrays[2 + role] = here;
      wrapping.state_specs[role] = py::reinterpret_borrow<py::object>(local_state.spec);
      host.state_types[role] = static_cast<int8_t>(here.scalar_type());
      host.roles |= 1u << role;
    };
    for (int k = 0; k < names.count; ++k) add_state(k, names.names[k]);
    if (accumulates) add_state(kAccumulator, kAccumulatorName);
    if (averages) add_state(kAverage, kAverageName);
    host.schema = schema_for(entry, names);
    if (rule_.has_step) {
      host.roles |= 1u << kStep;
      const at::Tensor& step = THPVariable_Unpack(py::object(entry["step"]).ptr());
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
  host.sizes = remember(tensor.sizes());
  host.param_strides = remember(tensor.strides());
  const auto strides_of = [&](const at::Tensor& array) {
    return array.strides() == tensor.strides() ? host.param_strides : remember(array.strides());
  };
  host.grad_strides = strides_of(grad);
  for (int k = 0; k < kMaxRowStates; ++k) {
    if (host.has(k)) host.state_strides[k] = strides_of(arrays[2 + k]);
  }
  if (onepass_ != nullptr) {
    host.member = &onepass_->member(param.ptr());
    host.member->fresh = host.fresh = host.fresh || host.member->fresh;
  }

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
    launch.on_device = std::make_unique<TableOnDevice>(*launcher, device, rule_, variant, storage,
                                                       scalars, groups_.size());
  }
  launch.table.storage = storage;
  launch.table.states = rule_.states(variant).count;
  launch.table.accumulates = onepass_ != nullptr && onepass_->accumulates;
  launch.table.averages = onepass_ != nullptr && onepass_->averages();
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
    if (onepass_ != nullptr && onepass_->accumulates && name.equal(py::str(kAccumulatorName))) {
      role = kAccumulator;
    }
    if (onepass_ != nullptr && onepass_->averages() && name.equal(py::str(kAverageName))) {
      role = kAverage;
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

// Where the sums of the rows' norms go. A side is a device; on each, rows of one spec come together.
void StepPlan::assign_blocks() {
  for (HostRow& host : rows_) {
    const Launch& launch = launches_[host.table];
    const auto at = std::find_if(sides_.begin(), sides_.end(),
                                 [&](const Side& side) { return side.device == launch.device; });
    const auto index = at - sides_.begin();
    if (at == sides_.end()) {
      sides_.push_back({launch.device, launcher_for(launch.device), {}, {}, {}});
    }
    Side& side = sides_[index];
    PyObject* spec = host.wrapping < 0 ? nullptr : wrappings_[host.wrapping].param_spec.ptr();
    const auto same = [&](const py::object& known) { return same_placement(known.ptr(), spec); };
    const auto found = std::find_if(side.specs.begin(), side.specs.end(), same);
    host.segment = static_cast<int>(found - side.specs.begin());
    if (found == side.specs.end()) side.specs.push_back(py::reinterpret_borrow<py::object>(spec));
  }
  for (Side& side : sides_) {
    int64_t blocks = 0;
    for (size_t segment = 0; segment < side.specs.size(); ++segment) {
      for (const HostRow& host : rows_) {
        const Launch& launch = launches_[host.table];
        if (launch.device != side.device || host.segment != static_cast<int>(segment)) continue;
        Row& row = launches_[host.table].table.rows[host.row];
        row.norm_block = blocks;
        blocks += norm_blocks(row.numel);
      }
      side.ends.push_back(blocks);
    }
    if (onepass_->measures || onepass_->check) {
      const auto bytes = blocks * static_cast<int64_t>(sizeof(NormSums));
      side.blocks = at::zeros({bytes}, at::TensorOptions(at::kByte).device(side.device));
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
