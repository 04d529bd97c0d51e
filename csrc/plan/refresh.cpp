// What a plan does every step before anything is written: one walk over the Python objects.
//
// With thousands of small tensors the step's time is this walk, and the walk's time is cache misses:
// a parameter with two states hangs from some forty cache lines of dicts, tensors and storages. So
// rows are checked a block at a time, in passes that each touch one level of these objects for the
// whole block and ask for the next level, and blocks are spread over torch's thread pool. Workers
// read Python objects while this thread holds the GIL for them; they change no reference count.
#include <ATen/Parallel.h>
#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>

#include "plan/plan.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

namespace {

// The reasons that several checks share; each ends the sentence "the plan is rebuilt because".
constexpr const char* kStateChanged = "the optimizer's state has other entries";
constexpr const char* kGroupsChanged = "the parameter groups have other members";

template <int kBytes>
inline void prefetch(const void* object) {
  const auto* at = static_cast<const char*>(object);
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(at + b);
  __builtin_prefetch(at + kBytes - 1);
}

inline void prefetch_tensor(const c10::TensorImpl* tensor) {
  prefetch<sizeof(c10::TensorImpl)>(tensor);
}

// The address of a tensor's first element, without materialising a copy-on-write storage. The
// accessors with checks and virtual calls are for tensors of any kind; these have been found plain.
inline void* address(const c10::TensorImpl& tensor) {
  auto* base = static_cast<char*>(const_cast<void*>(tensor.unsafe_storage().data()));
  return base + tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

inline bool is_copy_on_write(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().data_ptr().get_deleter() == c10::impl::cow::cow_deleter;
}

inline void prefetch_storage(const c10::TensorImpl& tensor) {
  prefetch<sizeof(c10::StorageImpl)>(tensor.unsafe_storage().unsafeGetStorageImpl());
}

}  // namespace

inline bool StepPlan::fits(const c10::TensorImpl& tensor, int8_t type, const HostRow& row,
                           uint32_t strides) const {
  const Launch& launch = launches_[row.table];
  if (tensor.key_set() != launch.plain_keys || tensor.dim() != row.ndim) return false;
  if (tensor.device() != launch.device) return false;
  if (static_cast<int8_t>(c10::typeMetaToScalarType(tensor.dtype())) != type) return false;
  const int64_t* sizes = dims_.data() + row.sizes;
  const int64_t* wanted = dims_.data() + strides;
  const int64_t* has_sizes = tensor.sizes().data();
  const int64_t* has_strides = tensor.strides().data();
  for (int d = 0; d < row.ndim; ++d) {
    if (has_sizes[d] != sizes[d]) return false;
    if (has_strides[d] != wanted[d] && sizes[d] > 1) return false;
  }
  return true;
}

std::optional<std::string> StepPlan::refresh(const py::list& param_groups, const py::dict& state,
                                             Purpose purpose) {
  purpose_ = purpose;
  const char* reason = refresh_groups(param_groups);
  if (reason == nullptr) reason = refresh_entries(state.ptr());
  for (Wrapping& wrapping : wrappings_) {
    if (reason == nullptr) reason = refresh_wrapping(wrapping);
  }
  if (reason == nullptr) {
    std::atomic<const char*> found{nullptr};
    for_blocks(rows_.size(), [&](size_t begin, size_t end) {
      const char* here = refresh_rows(begin, end);
      if (here != nullptr) found = here;
    });
    reason = found;
  }
  if (reason != nullptr) return reason;
  assign_slots();
  return std::nullopt;
}

const char* StepPlan::refresh_groups(const py::list& param_groups) {
  if (param_groups.size() != groups_.size()) return kGroupsChanged;
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    const auto dict = py::reinterpret_borrow<py::dict>(param_groups[g]);
    PyObject* params = PyDict_GetItemWithError(dict.ptr(), reader_.params_key());
    if (params == nullptr || !PyList_Check(params)) return kGroupsChanged;
    if (PyList_GET_SIZE(params) != Py_ssize_t(group.members.size())) return kGroupsChanged;
    for (size_t m = 0; m < group.members.size(); ++m) {
      if (PyList_GET_ITEM(params, m) != group.members[m]) return kGroupsChanged;
    }
    if (!group.seen.changed(dict, reader_)) continue;
    GroupValues values = read_group(group, dict);
    bool same = values.route_flags == group.values.route_flags &&
                rule_.variant(values.hyper) == group.variant;
    for (int k = 0; k < kMaxHyper; ++k) {
      same = same && values.live[k].defined() == group.values.live[k].defined();
    }
    if (!same) return "a flag of a parameter group changed";
    group.values = std::move(values);
    group.seen.keep();
  }
  for (PyObject* param : idle_) {
    if (THPVariable_Unpack(param).unsafeGetTensorImpl()->grad().defined()) {
      return "a parameter received its first gradient";
    }
  }
  return nullptr;
}

const char* StepPlan::refresh_entries(PyObject* state) {
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  size_t entry = 0;
  while (PyDict_Next(state, &position, &key, &value) != 0) {
    if (entry == entries_.size() || entries_[entry].key != key) return kStateChanged;
    const int row = entries_[entry++].row;
    if (row >= 0) state_dicts_[row] = value;
  }
  return entry == entries_.size() ? nullptr : kStateChanged;
}

// Opens a DTensor parameter and its gradient, which may come with a new spec from every backward.
const char* StepPlan::refresh_wrapping(Wrapping& wrapping) {
  HostRow& host = rows_[wrapping.row];
  const Local param = local_of(host.param.ptr());
  if (param.spec == nullptr || param.spec != wrapping.param_spec.ptr()) {
    return "a parameter is distributed over the ranks in another way";
  }
  wrapping.param = THPVariable_Unpack(host.param.ptr()).unsafeGetTensorImpl();
  host.impl = THPVariable_Unpack(param.tensor).unsafeGetTensorImpl();
  host.grad = nullptr;
  const at::Tensor& outer = const_cast<const c10::TensorImpl*>(wrapping.param)->grad();
  if (!outer.defined()) return nullptr;
  // The tensor keeps its Python object, and that one its local tensor, when this reference is gone.
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(outer));
  const Local grad = local_of(object.ptr());
  if (grad.spec != wrapping.grad_spec.ptr()) {
    if (!same_placement(grad.spec, param.spec)) {
      return "a gradient is distributed over the ranks in another way";
    }
    wrapping.grad_spec = py::reinterpret_borrow<py::object>(grad.spec);
  }
  host.grad = THPVariable_Unpack(grad.tensor).unsafeGetTensorImpl();
  return nullptr;
}

// The local tensor of a DTensor row's state, null if it is another tensor than the plan was built for.
PyObject* StepPlan::unwrapped_state(const HostRow& host, int role, PyObject* state) {
  Wrapping& wrapping = wrappings_[host.wrapping];
  const Local local = local_of(state);
  if (local.spec == nullptr || local.spec != wrapping.state_specs[role].ptr()) return nullptr;
  wrapping.states[role] = THPVariable_Unpack(state).unsafeGetTensorImpl();
  return local.tensor;
}

const char* StepPlan::refresh_rows(size_t begin, size_t end) {
  for (size_t r = begin; r < end; ++r) {
    prefetch<1>(rows_[r].param.ptr());
    if (state_dicts_[r] != nullptr) prefetch<sizeof(PyDictObject)>(state_dicts_[r]);
  }
  for (size_t r = begin; r < end; ++r) {
    if (state_dicts_[r] == nullptr) continue;
    if (!PyDict_Check(state_dicts_[r])) return kStateChanged;
    prefetch<128>(reinterpret_cast<PyDictObject*>(state_dicts_[r])->ma_keys);
  }
  PyObject* objects[kRowBlock][kRoles];
  for (size_t r = begin; r < end; ++r) {
    HostRow& host = rows_[r];
    if (host.wrapping < 0) host.impl = THPVariable_Unpack(host.param.ptr()).unsafeGetTensorImpl();
    prefetch_tensor(host.impl);
    if (state_dicts_[r] == nullptr) continue;
    if (!find_state_tensors(schemas_[host.schema], state_dicts_[r], objects[r - begin])) {
      return kStateChanged;
    }
  }
  for (size_t r = begin; r < end; ++r) {
    HostRow& host = rows_[r];
    for (int k = 0; k < kRoles; ++k) {
      if (!host.has(k)) continue;
      PyObject* object = objects[r - begin][k];
      if (host.wrapping >= 0 && k != kStep) object = unwrapped_state(host, k, object);
      if (object == nullptr || !THPVariable_CheckExact(object)) {
        return "a state is another kind of tensor";
      }
      host.states[k] = THPVariable_Unpack(object).unsafeGetTensorImpl();
      prefetch_tensor(host.states[k]);
    }
    if (host.impl->autograd_meta() != nullptr) prefetch<128>(host.impl->autograd_meta());
  }
  for (size_t r = begin; r < end; ++r) {
    HostRow& host = rows_[r];
    prefetch_storage(*host.impl);
    for (int k = 0; k < kRoles; ++k) {
      if (host.has(k)) prefetch_storage(*host.states[k]);
    }
    if (host.wrapping < 0) {
      const at::Tensor& grad = const_cast<const c10::TensorImpl*>(host.impl)->grad();
      host.grad = grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
    }
    if (host.grad != nullptr) prefetch_tensor(host.grad);
  }
  for (size_t r = begin; r < end; ++r) {
    if (rows_[r].grad != nullptr) prefetch_storage(*rows_[r].grad);
  }
  for (size_t r = begin; r < end; ++r) {
    const char* reason = refresh_row(rows_[r]);
    if (reason != nullptr) return reason;
  }
  return nullptr;
}

bool StepPlan::find_state_tensors(const Schema& schema, PyObject* state, PyObject** objects) {
  Py_ssize_t position = 0;
  PyObject* name = nullptr;
  PyObject* object = nullptr;
  size_t k = 0;
  while (PyDict_Next(state, &position, &name, &object) != 0) {
    if (k == schema.size() || schema[k].name.ptr() != name) return false;
    const int role = schema[k++].role;
    if (role == kIgnored) continue;
    objects[role] = object;
    prefetch<1>(object);
  }
  return k == schema.size();
}

const char* StepPlan::refresh_row(HostRow& host) {
  Row& row = launches_[host.table].table.rows[host.row];
  const bool takes_window = closes(purpose_) && host.member->taken;
  if (purpose_ == Purpose::kFlush && host.grad != nullptr) {
    const bool seen = host.grad == host.member->zeroed &&
                      host.grad->version_counter().current_version() == host.member->zeroed_version;
    if (!seen) return kUnseenGradient;
    host.grad = nullptr;
  }
  host.active = host.grad != nullptr || takes_window;
  row.grad = row.state[kAccumulator] = nullptr;
  if (!host.active) return nullptr;
  if (!fits(*host.impl, host.param_type, host, host.param_strides)) {
    return "a parameter has another dtype or layout";
  }
  if (host.grad != nullptr && !fits(*host.grad, host.grad_type, host, host.grad_strides)) {
    return "a gradient has another dtype or layout";
  }
  bool copy_on_write = row.numel > 0 && is_copy_on_write(*host.impl);
  for (int k = 0; k < kMaxRowStates; ++k) {
    if (!host.has(k)) continue;
    const c10::TensorImpl& state = *host.states[k];
    if (!fits(state, host.state_types[k], host, host.state_strides[k])) {
      return "a state was replaced by one of another dtype or layout";
    }
    copy_on_write = copy_on_write || is_copy_on_write(state);
    if (k != kAccumulator || takes_window || purpose_ == Purpose::kAccumulate) {
      row.state[k] = address(state);
    }
  }
  if (row.numel > 0) {
    row.param = address(*host.impl);
    if (host.grad != nullptr) row.grad = address(*host.grad);
    if (row.param == nullptr) return "a parameter's storage is empty";
    if (row.param == row.grad) return "a gradient is its parameter's own memory";
    if (host.grad != nullptr && onepass_ != nullptr && onepass_->zero_grads) {
      copy_on_write = copy_on_write || is_copy_on_write(*host.grad);
    }
  }
  if (host.has(kStep)) {
    const c10::TensorImpl& step = *host.states[kStep];
    const auto type = c10::typeMetaToScalarType(step.dtype());
    const Launch& launch = launches_[host.table];
    if (step.key_set() != (host.step_on_device ? launch.plain_keys : host_keys_) ||
        (host.step_on_device && step.device() != launch.device) || step.numel() != 1 ||
        (type != at::kFloat && type != at::kDouble)) {
      return "a step count has another dtype or device";
    }
    copy_on_write = copy_on_write || is_copy_on_write(step);
    host.step_at = address(step);
    host.step_is_double = type == at::kDouble;
    if (!host.step_on_device) {
      host.step = 1 + (host.step_is_double ? *static_cast<double*>(host.step_at)
                                           : double(*static_cast<float*>(host.step_at)));
    }
  }
  host.copy_on_write = copy_on_write;
  return nullptr;
}

void StepPlan::materialize(HostRow& host) {
  Row& row = launches_[host.table].table.rows[host.row];
  row.param = host.impl->mutable_data();
  if (host.grad != nullptr) {  // it may have shared the parameter's memory until now
    const bool writes = onepass_ != nullptr && onepass_->zero_grads;
    row.grad = writes ? host.grad->mutable_data() : const_cast<void*>(host.grad->data());
  }
  for (int k = 0; k < kMaxRowStates; ++k) {
    if (row.state[k] != nullptr) row.state[k] = host.states[k]->mutable_data();
  }
  if (host.has(kStep)) host.step_at = host.states[kStep]->mutable_data();
}

void StepPlan::assign_slots() {
  for (Launch& launch : launches_) {
    launch.renamed.assign(launch.slot_keys.size(), -1);
    launch.slot_keys.clear();
    launch.next_of_group.clear();
    launch.last_of_group.assign(groups_.size(), -1);
    launch.table.slots.clear();
  }
  for (HostRow& host : rows_) {
    if (!host.active) continue;
    if (host.copy_on_write) materialize(host);
    Launch& launch = launches_[host.table];
    if (launch.has_device_scalars()) continue;
    Row& row = launch.table.rows[host.row];
    row.slot = slot_for(launch, host, row.slot);
  }
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
  int slot = launch.last_of_group[host.group];
  while (slot >= 0 && !(keys[slot] == key)) slot = launch.next_of_group[slot];
  if (slot < 0) {
    slot = static_cast<int>(keys.size());
    keys.push_back(key);
    launch.next_of_group.push_back(launch.last_of_group[host.group]);
    launch.last_of_group[host.group] = slot;
    Table& table = launch.table;
    table.slots.resize(keys.size() * table.slot_size);
    const GroupValues& values = groups_[host.group].values;
    rule_.write_slot(table.storage.param, values.hyper, key.step, key.first,
                     values.maximize ? -1.0 : 1.0, table.slots.data() + slot * table.slot_size);
  }
  if (known && launch.renamed[previous] < 0) launch.renamed[previous] = slot;
  return slot;
}

}  // namespace fusedopt
