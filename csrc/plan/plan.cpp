#include "plan/plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "cpu/driver.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

namespace {

// The reasons that several checks share; each ends the sentence "the plan is rebuilt because".
constexpr const char* kStateChanged = "the optimizer's state has other entries";
constexpr const char* kGroupsChanged = "the parameter groups have other members";

// A tensor by its Python object; null where it is not torch's own type (a subclass is not trusted).
const at::Tensor* exact_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

}  // namespace

StepPlan::StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
                   const py::list& rows, const py::list& idle)
    : rule_(find_rule(rule)), reader_(rule_) {
  for (const py::handle group : param_groups) {
    Group& info = groups_.emplace_back();
    const auto dict = py::reinterpret_borrow<py::dict>(group);
    info.values = reader_.read(dict);
    info.variant = rule_.variant(info.values.hyper);
    for (const py::handle member : dict["params"]) info.members.push_back(member.ptr());
  }
  for (const py::handle param : idle) idle_.push_back(param.ptr());
  rows_.reserve(rows.size());
  for (const py::handle row : rows) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(row);
    add_row(tuple[0].cast<int>(), tuple[1], tuple[2].cast<bool>(), state);
  }
  for (Launch& launch : launches_) launch.table.cut(kCpuChunkElements);

  // The order in which `refresh` will meet the rows when it walks the state.
  std::unordered_map<PyObject*, int> row_of;
  for (size_t r = 0; r < rows_.size(); ++r) row_of.emplace(rows_[r].param.ptr(), int(r));
  for (const auto& [key, value] : state) {
    const auto found = row_of.find(key.ptr());
    const bool has_schema = found != row_of.end() && rows_[found->second].schema >= 0;
    entries_.push_back({key.ptr(), has_schema ? found->second : -1});
  }
}

void StepPlan::add_row(int group, const py::object& param, bool fresh, const py::dict& state) {
  const at::Tensor& tensor = THPVariable_Unpack(param.ptr());
  const at::Tensor& grad = tensor.grad().defined() ? tensor.grad() : tensor;
  const StateNames names = rule_.states(groups_[group].variant);
  std::vector<at::Tensor> arrays = {tensor, grad};
  HostRow host;
  if (names.count > 0 || rule_.has_step) {
    const auto entry = py::reinterpret_borrow<py::dict>(state[param]);
    for (int k = 0; k < names.count; ++k) {
      arrays.push_back(THPVariable_Unpack(py::object(entry[names.names[k]]).ptr()));
    }
    host.schema = schema_for(entry, names);
  }
  const at::Tensor& first_state = names.count > 0 ? arrays[2] : tensor;
  const StorageTuple storage{*storage_dtype(tensor), *storage_dtype(grad),
                             *storage_dtype(first_state)};
  if (storage_index(storage) < 0) {
    throw std::invalid_argument("no kernel is built for this combination of dtypes");
  }

  host.param = param;
  host.group = group;
  host.table = table_for(storage, groups_[group].variant);
  host.fresh = fresh;
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
  row.numel = tensor.numel() * components(tensor);
  if (auto layout = strided_layout(arrays)) {
    row.layout = static_cast<int32_t>(table.layouts.size());
    table.layouts.push_back(std::move(*layout));
  }
  rows_.push_back(std::move(host));
}

int StepPlan::table_for(StorageTuple storage, int variant) {
  for (size_t i = 0; i < launches_.size(); ++i) {
    if (launches_[i].variant == variant && launches_[i].table.storage == storage) {
      return static_cast<int>(i);
    }
  }
  Launch& launch = launches_.emplace_back();
  launch.variant = variant;
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
      same = schemas_[s][k].role == schema[k].role && schemas_[s][k].name.equal(schema[k].name);
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

bool StepPlan::fits(const c10::TensorImpl& tensor, int8_t type, const HostRow& row,
                    uint32_t strides) const {
  if (!is_plain_cpu(tensor) || tensor.dim() != row.ndim) return false;
  if (static_cast<int8_t>(c10::typeMetaToScalarType(tensor.dtype())) != type) return false;
  const c10::IntArrayRef sizes(dims_.data() + row.sizes, row.ndim);
  return tensor.sizes() == sizes &&
         same_layout(sizes, tensor.strides(), {dims_.data() + strides, row.ndim});
}

std::optional<std::string> StepPlan::refresh(const py::list& param_groups, const py::dict& state) {
  const char* reason = refresh_groups(param_groups);
  if (reason == nullptr) reason = refresh_states(state.ptr());
  if (reason != nullptr) return reason;
  for (Launch& launch : launches_) {
    launch.renamed.assign(launch.slot_keys.size(), -1);
    launch.slot_keys.clear();
    launch.table.slots.clear();
  }
  for (HostRow& host : rows_) {
    reason = refresh_row(host);
    if (reason != nullptr) return reason;
  }
  return std::nullopt;
}

const char* StepPlan::refresh_groups(const py::list& param_groups) {
  if (param_groups.size() != groups_.size()) return kGroupsChanged;
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    const auto dict = py::reinterpret_borrow<py::dict>(param_groups[g]);
    PyObject* params = PyDict_GetItem(dict.ptr(), reader_.params_key());
    if (params == nullptr || !PyList_Check(params)) return kGroupsChanged;
    if (PyList_GET_SIZE(params) != Py_ssize_t(group.members.size())) return kGroupsChanged;
    for (size_t m = 0; m < group.members.size(); ++m) {
      if (PyList_GET_ITEM(params, m) != group.members[m]) return kGroupsChanged;
    }
    const GroupValues values = reader_.read(dict);
    if (values.route_flags != group.values.route_flags ||
        rule_.variant(values.hyper) != group.variant) {
      return "a flag of a parameter group changed";
    }
    group.values = values;
  }
  for (PyObject* param : idle_) {
    if (THPVariable_Unpack(param).unsafeGetTensorImpl()->grad().defined()) {
      return "a parameter received its first gradient";
    }
  }
  return nullptr;
}

const char* StepPlan::refresh_states(PyObject* state) {
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  size_t entry = 0;
  while (PyDict_Next(state, &position, &key, &value) != 0) {
    if (entry == entries_.size() || entries_[entry].key != key) return kStateChanged;
    const int index = entries_[entry++].row;
    if (index < 0) continue;
    if (!PyDict_Check(value)) return kStateChanged;
    HostRow& host = rows_[index];
    Row& row = launches_[host.table].table.rows[host.row];
    const Schema& schema = schemas_[host.schema];
    Py_ssize_t inner = 0;
    PyObject* name = nullptr;
    PyObject* object = nullptr;
    size_t k = 0;
    while (PyDict_Next(value, &inner, &name, &object) != 0) {
      if (k == schema.size()) return kStateChanged;
      const StateKey& expected = schema[k++];
      if (expected.name.ptr() != name &&
          PyObject_RichCompareBool(expected.name.ptr(), name, Py_EQ) != 1) {
        return kStateChanged;
      }
      if (expected.role == kIgnored) continue;
      const at::Tensor* tensor = exact_tensor(object);
      if (tensor == nullptr) return "a state is no longer a plain tensor";
      c10::TensorImpl* impl = tensor->unsafeGetTensorImpl();
      host.states[expected.role] = impl;
      if (expected.role == kStep) {
        const auto type = c10::typeMetaToScalarType(impl->dtype());
        if (!is_plain_cpu(*impl) || impl->numel() != 1 ||
            (type != at::kFloat && type != at::kDouble)) {
          return "a step count has another dtype or device";
        }
        host.step_at = impl->mutable_data();
        host.step_is_double = type == at::kDouble;
      } else {
        if (!fits(*impl, host.state_type, host, host.state_strides[expected.role])) {
          return "a state was replaced by one of another dtype or layout";
        }
        row.state[expected.role] = impl->mutable_data();
      }
    }
    if (k != schema.size()) return kStateChanged;
  }
  return entry == entries_.size() ? nullptr : kStateChanged;
}

const char* StepPlan::refresh_row(HostRow& host) {
  Launch& launch = launches_[host.table];
  Row& row = launch.table.rows[host.row];
  c10::TensorImpl* param = THPVariable_Unpack(host.param.ptr()).unsafeGetTensorImpl();
  const at::Tensor& grad = const_cast<const c10::TensorImpl*>(param)->grad();
  host.impl = param;
  host.active = grad.defined();
  row.grad = nullptr;
  if (!host.active) return nullptr;
  if (!fits(*param, host.param_type, host, host.param_strides)) {
    return "a parameter has another dtype or layout";
  }
  const c10::TensorImpl* grad_impl = grad.unsafeGetTensorImpl();
  if (!fits(*grad_impl, host.grad_type, host, host.grad_strides)) {
    return "a gradient has another dtype or layout";
  }
  if (row.numel > 0) {
    row.param = param->mutable_data();
    row.grad = grad_impl->data();
    if (row.param == nullptr) return "a parameter's storage is empty";
    if (row.param == row.grad) return "a gradient is its parameter's own memory";
  }
  if (rule_.has_step) {
    host.step = 1 + (host.step_is_double ? *static_cast<double*>(host.step_at)
                                         : double(*static_cast<float*>(host.step_at)));
  }
  row.slot = slot_for(launch, host, row.slot);
  return nullptr;
}

int StepPlan::slot_for(Launch& launch, const HostRow& host, int previous) {
  const SlotKey key{host.group, host.step, host.fresh};
  std::vector<SlotKey>& keys = launch.slot_keys;
  // Rows that shared a slot in the last step nearly always share one again.
  const bool known = previous < int(launch.renamed.size());
  if (known) {
    const int slot = launch.renamed[previous];
    if (slot >= 0 && keys[slot] == key) return slot;
  }
  int slot = static_cast<int>(std::find(keys.begin(), keys.end(), key) - keys.begin());
  if (slot == int(keys.size())) {
    keys.push_back(key);
    Table& table = launch.table;
    table.slots.resize(keys.size() * table.slot_size);
    const GroupValues& values = groups_[host.group].values;
    rule_.write_slot(table.storage.param, values.hyper, key.step, key.first,
                     values.maximize ? -1.0 : 1.0, table.slots.data() + slot * table.slot_size);
  }
  if (known && launch.renamed[previous] < 0) launch.renamed[previous] = slot;
  return slot;
}

void StepPlan::launch() {
  for (HostRow& host : rows_) {
    if (!host.active) continue;
    host.fresh = false;
    host.impl->bump_version();
    const int count = launches_[host.table].table.states;
    for (int k = 0; k < count; ++k) host.states[k]->bump_version();
    if (!rule_.has_step) continue;
    host.states[kStep]->bump_version();
    if (host.step_is_double) {
      *static_cast<double*>(host.step_at) = host.step;
    } else {
      *static_cast<float*>(host.step_at) = static_cast<float>(host.step);
    }
  }
  const Tier& tier = current_tier();
  const py::gil_scoped_release no_gil;
  for (const Launch& launch : launches_) {
    const Table& table = launch.table;
    const Kernel kernel = tier.kernel(rule_.index, launch.variant, storage_index(table.storage));
    run_table(table, kernel, run_on_torch_pool);
  }
}

py::list StepPlan::describe() const {
  py::list tables;
  for (const Launch& launch : launches_) {
    const Table& table = launch.table;
    py::dict entry;
    entry["storage"] =
        py::make_tuple(dtype_name(table.storage.param), dtype_name(table.storage.grad),
                       dtype_name(table.storage.state));
    entry["variant"] = launch.variant;
    entry["rows"] = table.rows.size();
    entry["strided_rows"] = table.layouts.size();
    entry["chunks"] = table.chunks.size();
    entry["slots"] = launch.slot_keys.size();
    tables.append(entry);
  }
  return tables;
}

}  // namespace fusedopt
