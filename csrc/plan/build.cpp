// Building a plan: which table a parameter's row is in, and what is remembered to recognise its tensors.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "plan/arguments.h"
#include "plan/plan.h"
#include "plan/tensors.h"

namespace fusedopt {

namespace {

// `reason` is why a row's tensors do not fit, "" if they do.
void check_fits(const std::string& reason) {
  if (!reason.empty()) throw std::invalid_argument("kernels cannot update a row: " + reason);
}

class Builder {
 public:
  Builder(PlanRows& plan, const py::dict& state, const Launchers& launchers)
      : plan_(plan), options_(plan.options), state_(state), launchers_(launchers) {}

  void add_groups(const py::list& param_groups, const PlacedParams& rows);
  void add_row(size_t group, const py::object& param);
  std::vector<NormDomain> norm_domains();

 private:
  device::Launcher* launcher_for(c10::Device device) const;
  int schema_for(const py::dict& state, const StateNames& names, const ScalarStates& scalars);
  int table_for(StorageTuple storage, int variant, c10::Device device, device::Scalars scalars);
  uint32_t remember(c10::IntArrayRef dims);

  PlanRows& plan_;
  const StepOptions& options_;
  const py::dict& state_;
  const Launchers& launchers_;
};

device::Launcher* Builder::launcher_for(c10::Device device) const {
  const std::string type = c10::DeviceTypeName(device.type(), /*lower_case=*/true);
  const auto found = launchers_.find(type);
  if (found == launchers_.end()) return nullptr;
  void* launcher = PyCapsule_GetPointer(found->second.ptr(), kLauncherCapsule);
  if (launcher == nullptr) throw py::error_already_set();
  return static_cast<device::Launcher*>(launcher);
}

void Builder::add_groups(const py::list& param_groups, const PlacedParams& rows) {
  for (const py::handle group : param_groups) {
    Group& info = plan_.groups.emplace_back();
    const py::dict dict = dict_of(group, "a param group");
    for (const py::handle member : dict["params"]) info.members.push_back(member.ptr());
  }
  for (const auto& [place, param] : rows) {
    Group& group = plan_.groups.at(place);
    const c10::Device device = tensor_of(param.ptr(), "a row's parameter").device();
    if (launcher_for(device) == nullptr) {
      group.on_host = true;
    } else {
      group.live = device.is_cpu() ? LiveTensors::kAll : LiveTensors::kOffHost;
    }
  }
  for (size_t g = 0; g < plan_.groups.size(); ++g) {
    Group& group = plan_.groups[g];
    group.values = plan_.read_group(group, dict_of(param_groups[g], "a param group"));
    group.flags = group_flags(plan_.rule, group.values);
  }
}

void Builder::add_row(size_t group, const py::object& param) {
  HostRow host;
  const Local local = local_of(param.ptr());
  const at::Tensor& tensor = tensor_of(local.tensor, "a row's parameter");
  const py::object grad_or_none = param.attr("grad");
  const Local local_grad = grad_or_none.is_none() ? local : local_of(grad_or_none.ptr());
  const at::Tensor& grad = tensor_of(local_grad.tensor, "a row's gradient");
  check_fits(why_not_fused(tensor, grad_or_none.is_none() ? at::Tensor() : grad));
  if (!tensor.is_cpu() && launcher_for(tensor.device()) == nullptr) {
    check_fits("nothing launches kernels on its device");
  }
  Wrapping wrapping{static_cast<int>(plan_.rows.size())};
  const GroupFlags& flags = plan_.groups[group].flags;
  const StateNames names = plan_.rule.states(flags.variant);
  const ScalarStates scalars =
      flags.keeps_scalar_states ? plan_.rule.scalar_states : ScalarStates{};
  std::vector<at::Tensor> arrays = {tensor, grad};
  const GroupValues& values = plan_.groups[group].values;
  // Where a device's memory is the host's, the flags say whose count it is, as torch has it.
  const bool counts_there =
      (values.route_flags & (kCapturable | kFused)) != 0 || options_.may_skip();
  bool device_scalars = counts_there;
  for (const at::Tensor& live : values.live) device_scalars = device_scalars || live.defined();
  const bool accumulates = options_.accumulates;
  const bool averages = options_.averages();
  arrays.resize(kMaxArrays);
  if (names.count > 0 || flags.keeps_scalar_states || accumulates || averages) {
    const py::dict entry = dict_of(state_[param], "a parameter's state");
    const auto add_state = [&](int role, const char* name) {
      const Local local_state = local_of(py::object(entry[name]).ptr());
      const at::Tensor& here = tensor_of(local_state.tensor, name);
      check_fits(why_state_unfit(tensor, here));
      arrays[2 + role] = here;
      wrapping.state_specs[role] = py::reinterpret_borrow<py::object>(local_state.spec);
      const at::ScalarType arithmetic =
          tensor.element_size() == 2 ? at::kFloat : tensor.scalar_type();
      if (here.scalar_type() != (role < names.count ? arrays[2].scalar_type() : arithmetic)) {
        check_fits(std::string(name) + " has another dtype than kernels take it for");
      }
      host.state_types[role] = static_cast<int8_t>(here.scalar_type());
      host.roles |= 1u << role;
    };
    for (int k = 0; k < names.count; ++k) add_state(k, names.names[k]);
    if (accumulates) add_state(kAccumulator, kAccumulatorName);
    if (averages) add_state(kAverage, kAverageName);
    host.schema = schema_for(entry, names, scalars);
    for (int k = 0; k < scalars.count; ++k) {
      host.roles |= 1u << (kScalar + k);
      const char* name = scalars.states[k].name;
      const at::Tensor& scalar = tensor_of(py::object(entry[name]).ptr(), name);
      const bool there = launcher_for(tensor.device()) != nullptr &&
                         scalar.device() == tensor.device() &&
                         (!scalar.is_cpu() || counts_there || name[0] == '_');
      if (there) host.on_device |= 1u << k;
      device_scalars = device_scalars || there;
    }
  }
  const at::Tensor& first_state = names.count > 0 ? arrays[2] : tensor;
  const StorageTuple storage{*storage_dtype(tensor), *storage_dtype(grad),
                             *storage_dtype(first_state)};
  if (storage_index(storage) < 0) {
    throw std::invalid_argument("no kernel is built for this combination of dtypes");
  }

  host.param = param;
  host.group = static_cast<int>(group);
  host.table = table_for(storage, flags.variant, tensor.device(),
                         device_scalars ? device::Scalars::kDevice : device::Scalars::kHost);
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
  if (plan_.memory != nullptr) {
    host.member = &plan_.memory->member(param.ptr());
  }

  Table& table = plan_.tables[host.table].table;
  host.row = static_cast<int>(table.rows.size());
  Row& row = table.rows.emplace_back();
  if (plan_.tables[host.table].has_device_scalars()) row.slot = host.row;
  row.numel = tensor.numel() * components(tensor);
  if (auto layout = strided_layout(arrays)) {
    row.layout = static_cast<int32_t>(table.layouts.size());
    table.layouts.push_back(std::move(*layout));
  }
  if (local.spec != nullptr) {
    wrapping.param_spec = py::reinterpret_borrow<py::object>(local.spec);
    wrapping.grad_spec = py::reinterpret_borrow<py::object>(local_grad.spec);
    host.wrapping = static_cast<int>(plan_.wrappings.size());
    plan_.wrappings.push_back(std::move(wrapping));
  }
  plan_.rows.push_back(std::move(host));
}

int Builder::table_for(StorageTuple storage, int variant, c10::Device device,
                       device::Scalars scalars) {
  device::Launcher* launcher = launcher_for(device);
  const bool device_scalars = launcher != nullptr && scalars == device::Scalars::kDevice;
  for (size_t i = 0; i < plan_.tables.size(); ++i) {
    const TablePlan& known = plan_.tables[i];
    if (known.variant == variant && known.table.storage == storage && known.device == device &&
        known.has_device_scalars() == device_scalars) {
      return static_cast<int>(i);
    }
  }
  TablePlan& plan = plan_.tables.emplace_back(variant, device, plain_keys(device.type()));
  if (launcher != nullptr) {
    plan.on_device = std::make_unique<TableOnDevice>(*launcher, device, plan_.rule, variant,
                                                     storage, scalars, plan_.groups.size());
  }
  plan.table.storage = storage;
  plan.table.states = plan_.rule.states(variant).count;
  plan.table.accumulates = options_.accumulates;
  plan.table.averages = options_.averages();
  plan.table.slot_size = plan_.rule.slot_size(storage.param);
  return static_cast<int>(plan_.tables.size()) - 1;
}

int Builder::schema_for(const py::dict& state, const StateNames& names,
                        const ScalarStates& scalars) {
  Schema schema;
  for (const auto& [key, value] : state) {
    const auto name = py::reinterpret_borrow<py::object>(key);
    int role = kIgnored;
    for (int k = 0; k < scalars.count; ++k) {
      if (name.equal(py::str(scalars.states[k].name))) role = kScalar + k;
    }
    for (int k = 0; k < names.count; ++k) {
      if (name.equal(py::str(names.names[k]))) role = k;
    }
    if (options_.accumulates && name.equal(py::str(kAccumulatorName))) {
      role = kAccumulator;
    }
    if (options_.averages() && name.equal(py::str(kAverageName))) {
      role = kAverage;
    }
    schema.push_back({name, role});
  }
  for (size_t s = 0; s < plan_.schemas.size(); ++s) {
    bool same = plan_.schemas[s].size() == schema.size();
    for (size_t k = 0; same && k < schema.size(); ++k) {
      same =
          plan_.schemas[s][k].role == schema[k].role && plan_.schemas[s][k].name.is(schema[k].name);
    }
    if (same) return static_cast<int>(s);
  }
  plan_.schemas.push_back(std::move(schema));
  return static_cast<int>(plan_.schemas.size()) - 1;
}

uint32_t Builder::remember(c10::IntArrayRef dims) {
  const auto at = static_cast<uint32_t>(plan_.dims.size());
  plan_.dims.insert(plan_.dims.end(), dims.begin(), dims.end());
  return at;
}

// Where the sums of the rows' norms go: on each device, rows of one spec come together.
std::vector<NormDomain> Builder::norm_domains() {
  std::vector<NormDomain> domains;
  for (HostRow& host : plan_.rows) {
    const TablePlan& plan = plan_.table_of(host);
    auto domain = std::find_if(domains.begin(), domains.end(), [&](const NormDomain& known) {
      return known.device == plan.device;
    });
    if (domain == domains.end()) {
      domain = domains.insert(domain, {plan.device, launcher_for(plan.device), plan.table.storage});
    }
    std::vector<py::object>& specs = domain->specs;
    PyObject* spec = host.wrapping < 0 ? nullptr : plan_.wrappings[host.wrapping].param_spec.ptr();
    const auto found = std::find_if(specs.begin(), specs.end(), [&](const py::object& known) {
      return same_placement(known.ptr(), spec);
    });
    host.segment = static_cast<int>(found - specs.begin());
    if (found == specs.end()) specs.push_back(py::reinterpret_borrow<py::object>(spec));
  }
  for (NormDomain& domain : domains) {
    int64_t blocks = 0;
    for (size_t segment = 0; segment < domain.specs.size(); ++segment) {
      for (const HostRow& host : plan_.rows) {
        if (plan_.table_of(host).device != domain.device) continue;
        if (host.segment != static_cast<int>(segment)) continue;
        Row& row = plan_.row_of(host);
        row.norm_block = blocks;
        blocks += norm_blocks(row.numel);
      }
      domain.ends.push_back(blocks);
    }
    if (options_.measures || options_.check) {
      const auto bytes = blocks * static_cast<int64_t>(sizeof(NormSums));
      domain.blocks = at::zeros({bytes}, at::TensorOptions(at::kByte).device(domain.device));
    }
  }
  return domains;
}

}  // namespace

PlanRows::PlanRows(const RuleInfo& rule, std::shared_ptr<StepMemory> memory)
    : rule(rule), reader(rule), memory(std::move(memory)), host_keys(plain_keys(at::kCPU)) {
  if (this->memory != nullptr) options = this->memory->options;
}

bool PlanRows::has_other_options() const {
  if (memory == nullptr) return false;
  const StepOptions& now = memory->options;
  return now.measures != options.measures || now.check != options.check ||
         now.accumulates != options.accumulates || now.averages() != options.averages();
}

GroupValues PlanRows::read_group(const Group& group, const py::dict& dict) const {
  GroupValues values = reader.read(dict, group.live);
  if (group.on_host) {  // rows on both sides: the host needs the numbers too, and waits for them
    for (int k = 0; k < kMaxHyper; ++k) {
      if (values.live[k].defined()) values.hyper.values[k] = values.live[k].item().toDouble();
    }
  }
  return values;
}

StepPlan::StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
                   const PlacedParams& rows, std::vector<py::object> idle,
                   const Launchers& launchers, std::shared_ptr<CapturedTables> captured,
                   std::shared_ptr<StepMemory> memory, bool new_states)
    : rows_(find_rule(rule), std::move(memory)),
      captured_(std::move(captured)),
      new_states_(new_states) {
  Builder builder(rows_, state, launchers);
  builder.add_groups(param_groups, rows);
  for (const py::object& param : idle) tensor_of(param.ptr(), "a member of idle");
  rows_.idle = std::move(idle);
  rows_.rows.reserve(rows.size());
  for (const auto& [group, param] : rows) builder.add_row(group, param);
  for (TablePlan& plan : rows_.tables) {
    if (plan.on_device == nullptr) {
      plan.table.cut(kCpuChunkElements);
    } else {
      has_devices_ = true;
    }
  }
  if (rows_.memory != nullptr) domains_ = builder.norm_domains();
  rows_.state_dicts.resize(rows_.rows.size());
  // The order in which a walk will meet the rows in the state.
  std::unordered_map<PyObject*, int> row_of;
  for (size_t r = 0; r < rows_.rows.size(); ++r) {
    rows_.all.push_back(static_cast<int>(r));
    row_of.emplace(rows_.rows[r].param.ptr(), static_cast<int>(r));
  }
  for (const auto& [key, value] : state) {
    const auto found = row_of.find(key.ptr());
    const bool has_schema = found != row_of.end() && rows_.rows[found->second].schema >= 0;
    rows_.entries.push_back({key.ptr(), has_schema ? found->second : -1});
  }
}

py::list StepPlan::describe() const {
  py::list tables;
  for (const TablePlan& plan : rows_.tables) {
    const Table& table = plan.table;
    py::dict entry;
    entry["device"] = plan.device.str();
    entry["storage"] =
        py::make_tuple(dtype_name(table.storage.param), dtype_name(table.storage.grad),
                       dtype_name(table.storage.state));
    entry["variant"] = plan.variant;
    entry["rows"] = table.rows.size();
    entry["strided_rows"] = table.layouts.size();
    entry["chunks"] = plan.on_device != nullptr ? plan.on_device->chunks()
                                                : static_cast<int64_t>(table.chunks.size());
    entry["slots"] = plan.has_device_scalars() ? table.rows.size() : plan.slot_keys.size();
    entry["device_scalars"] = plan.has_device_scalars();
    tables.append(entry);
  }
  return tables;
}

}  // namespace fusedopt
