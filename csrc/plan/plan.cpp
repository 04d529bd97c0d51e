#include "plan/plan.h"

#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <unordered_map>

#include "cpu/driver.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

StepPlan::StepPlan(const std::string& rule, const py::list& param_groups, const py::dict& state,
                   const py::list& rows, const py::list& idle)
    : rule_(find_rule(rule)), reader_(rule_), plain_keys_(plain_cpu_keys()) {
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
    host.roles = static_cast<uint8_t>((1u << names.count) - 1);
    if (rule_.has_step) host.roles |= 1u << kStep;
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

void StepPlan::launch() {
  const Tier& tier = current_tier();
  std::vector<Work> work;
  for (const Launch& launch : launches_) {
    const int storage = storage_index(launch.table.storage);
    work.push_back({&launch.table, tier.kernel(rule_.index, launch.variant, storage)});
  }
  const py::gil_scoped_release no_gil;
  for_blocks(rows_.size(), [this](size_t begin, size_t end) { commit(begin, end); });
  run_tables(work, run_on_torch_pool);
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
    host.impl->bump_version();
    for (int k = 0; k <= kMaxStates; ++k) {
      if (host.has(k)) host.states[k]->bump_version();
    }
    if (!host.has(kStep)) continue;
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
