// What a step does before anything is written: one walk over the Python objects.
//
// With thousands of small tensors the step's time is this walk, and the walk's time is cache misses:
// a parameter with two states hangs from some forty cache lines of dicts, tensors and storages. So
// rows are checked a block at a time, in passes that each touch one level of these objects for the
// whole block and ask for the next level, and blocks are spread over torch's thread pool. Workers
// read Python objects while this thread holds the GIL for them; they change no reference count.
#include <ATen/Parallel.h>
#include <c10/core/impl/COWDeleter.h>

#include <atomic>

#include "plan/arguments.h"
#include "plan/pool.h"
#include "plan/rows.h"
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

// The address of a tensor's first element, without materialising a copy-on-write storage; null if the
// storage was freed, or shrunk so that it ends before the last of the elements. The accessors with
// checks and virtual calls are for tensors of any kind; these have been found plain.
inline void* address(const c10::TensorImpl& tensor) {
  const c10::StorageImpl& storage = *tensor.unsafe_storage().unsafeGetStorageImpl();
  int64_t end = tensor.storage_offset() + 1;
  const c10::IntArrayRef sizes = tensor.sizes();
  for (size_t d = 0; d < sizes.size(); ++d) end += (sizes[d] - 1) * tensor.strides()[d];
  const auto item = static_cast<int64_t>(tensor.dtype().itemsize());
  auto* base = static_cast<char*>(const_cast<void*>(storage.data()));
  if (base == nullptr || static_cast<int64_t>(storage.nbytes()) < end * item) return nullptr;
  return base + tensor.storage_offset() * item;
}

inline bool is_copy_on_write(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().data_ptr().get_deleter() == c10::impl::cow::cow_deleter;
}

inline void prefetch_storage(const c10::TensorImpl& tensor) {
  prefetch<sizeof(c10::StorageImpl)>(tensor.unsafe_storage().unsafeGetStorageImpl());
}

class Walk {
 public:
  Walk(PlanRows& plan, Purpose purpose) : plan_(plan), purpose_(purpose) {}
  const char* run(const py::list& param_groups, const py::dict& state);

 private:
  const char* walk_groups(const py::list& param_groups);
  const char* find_states(PyObject* state);
  const char* find_named_states(PyObject* state);
  const char* open_wrapping(HostRow& host);
  PyObject* unwrapped_state(const HostRow& host, int role, PyObject* state);
  const char* walk_rows(const int* begin, const int* end);
  static bool find_state_tensors(const Schema& schema, PyObject* state, PyObject** objects);
  const char* walk_row(HostRow& host);
  bool fits(const c10::TensorImpl& tensor, int8_t type, const HostRow& row, uint32_t strides) const;

  PlanRows& plan_;
  Purpose purpose_;
};

inline bool Walk::fits(const c10::TensorImpl& tensor, int8_t type, const HostRow& row,
                       uint32_t strides) const {
  const TablePlan& plan = plan_.table_of(row);
  if (tensor.key_set() != plan.plain_keys || tensor.dim() != row.ndim) return false;
  if (tensor.device() != plan.device) return false;
  if (static_cast<int8_t>(c10::typeMetaToScalarType(tensor.dtype())) != type) return false;
  const int64_t* sizes = plan_.dims.data() + row.sizes;
  const int64_t* wanted = plan_.dims.data() + strides;
  const int64_t* has_sizes = tensor.sizes().data();
  const int64_t* has_strides = tensor.strides().data();
  for (int d = 0; d < row.ndim; ++d) {
    if (has_sizes[d] != sizes[d]) return false;
    if (has_strides[d] != wanted[d] && sizes[d] > 1) return false;
  }
  return true;
}

const char* Walk::run(const py::list& param_groups, const py::dict& state) {
  const std::vector<int>& rows = plan_.present();
  const char* reason = walk_groups(param_groups);
  if (reason == nullptr)
    reason = plan_.names ? find_named_states(state.ptr()) : find_states(state.ptr());
  if (!plan_.wrappings.empty()) {
    for (const int r : rows) {
      if (reason == nullptr && plan_.rows[r].wrapping >= 0) reason = open_wrapping(plan_.rows[r]);
    }
  }
  if (reason != nullptr) return reason;
  std::atomic<const char*> found{nullptr};
  for_blocks(rows.size(), [&](size_t begin, size_t end) {
    const char* here = walk_rows(rows.data() + begin, rows.data() + end);
    if (here != nullptr) found = here;
  });
  return found;
}

const char* Walk::walk_groups(const py::list& param_groups) {
  if (param_groups.size() != plan_.groups.size()) return kGroupsChanged;
  for (size_t g = 0; g < plan_.groups.size(); ++g) {
    Group& group = plan_.groups[g];
    const py::dict dict = dict_of(PyList_GET_ITEM(param_groups.ptr(), g), "a param group");
    PyObject* params = PyDict_GetItemWithError(dict.ptr(), plan_.reader.params_key());
    if (params == nullptr || !PyList_Check(params)) return kGroupsChanged;
    if (PyList_GET_SIZE(params) != Py_ssize_t(group.members.size())) return kGroupsChanged;
    for (size_t m = 0; m < group.members.size(); ++m) {
      if (PyList_GET_ITEM(params, m) != group.members[m]) return kGroupsChanged;
    }
    if (!group.seen.changed(dict, plan_.reader)) continue;
    GroupValues values = plan_.read_group(group, dict);
    bool same = values.route_flags == group.values.route_flags &&
                group_flags(plan_.rule, values) == group.flags;
    for (int k = 0; k < kMaxHyper; ++k) {
      same = same && values.live[k].defined() == group.values.live[k].defined();
    }
    if (!same) return "a flag of a parameter group changed";
    group.values = std::move(values);
    group.seen.keep();
  }
  if (plan_.names) return nullptr;
  for (const py::object& param : plan_.idle) {
    if (THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()->grad().defined()) {
      return "a parameter received its first gradient";
    }
  }
  return nullptr;
}

const char* Walk::find_states(PyObject* state) {
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  size_t entry = 0;
  while (PyDict_Next(state, &position, &key, &value) != 0) {
    if (entry == plan_.entries.size() || plan_.entries[entry].key != key) return kStateChanged;
    const int row = plan_.entries[entry++].row;
    if (row >= 0) plan_.state_dicts[row] = value;
  }
  return entry == plan_.entries.size() ? nullptr : kStateChanged;
}

// The same for a few rows, without a look at the others.
const char* Walk::find_named_states(PyObject* state) {
  for (const int r : plan_.named) {
    if (plan_.rows[r].schema < 0) continue;
    plan_.state_dicts[r] = PyDict_GetItemWithError(state, plan_.rows[r].param.ptr());
    if (plan_.state_dicts[r] == nullptr) return kStateChanged;
  }
  return nullptr;
}

// Opens a DTensor parameter and its gradient, which may come with a new spec from every backward.
const char* Walk::open_wrapping(HostRow& host) {
  Wrapping& wrapping = plan_.wrappings[host.wrapping];
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
PyObject* Walk::unwrapped_state(const HostRow& host, int role, PyObject* state) {
  Wrapping& wrapping = plan_.wrappings[host.wrapping];
  const Local local = local_of(state);
  if (local.spec == nullptr || local.spec != wrapping.state_specs[role].ptr()) return nullptr;
  wrapping.states[role] = THPVariable_Unpack(state).unsafeGetTensorImpl();
  return local.tensor;
}

const char* Walk::walk_rows(const int* begin, const int* end) {
  for (const int* at = begin; at != end; ++at) {
    prefetch<1>(plan_.rows[*at].param.ptr());
    if (plan_.state_dicts[*at] != nullptr) prefetch<sizeof(PyDictObject)>(plan_.state_dicts[*at]);
  }
  for (const int* at = begin; at != end; ++at) {
    if (plan_.state_dicts[*at] == nullptr) continue;
    if (!PyDict_Check(plan_.state_dicts[*at])) return kStateChanged;
    prefetch<128>(reinterpret_cast<PyDictObject*>(plan_.state_dicts[*at])->ma_keys);
  }
  PyObject* objects[kRowBlock][kRoles];
  for (const int* at = begin; at != end; ++at) {
    HostRow& host = plan_.rows[*at];
    if (host.wrapping < 0) host.impl = THPVariable_Unpack(host.param.ptr()).unsafeGetTensorImpl();
    prefetch_tensor(host.impl);
    if (plan_.state_dicts[*at] == nullptr) continue;
    if (!find_state_tensors(plan_.schemas[host.schema], plan_.state_dicts[*at],
                            objects[at - begin])) {
      return kStateChanged;
    }
  }
  for (const int* at = begin; at != end; ++at) {
    HostRow& host = plan_.rows[*at];
    for (int k = 0; k < kRoles; ++k) {
      if (!host.has(k)) continue;
      PyObject* object = objects[at - begin][k];
      if (host.wrapping >= 0 && k < kScalar) object = unwrapped_state(host, k, object);
      if (object == nullptr || !THPVariable_CheckExact(object)) {
        return "a state is another kind of tensor";
      }
      host.states[k] = THPVariable_Unpack(object).unsafeGetTensorImpl();
      prefetch_tensor(host.states[k]);
    }
    if (host.impl->autograd_meta() != nullptr) prefetch<128>(host.impl->autograd_meta());
  }
  for (const int* at = begin; at != end; ++at) {
    HostRow& host = plan_.rows[*at];
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
  for (const int* at = begin; at != end; ++at) {
    if (plan_.rows[*at].grad != nullptr) prefetch_storage(*plan_.rows[*at].grad);
  }
  for (const int* at = begin; at != end; ++at) {
    const char* reason = walk_row(plan_.rows[*at]);
    if (reason != nullptr) return reason;
  }
  return nullptr;
}

bool Walk::find_state_tensors(const Schema& schema, PyObject* state, PyObject** objects) {
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

const char* Walk::walk_row(HostRow& host) {
  Row& row = plan_.row_of(host);
  const bool takes_window = closes(purpose_) && host.member->has_accumulated;
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
    if (row.numel > 0 && (k != kAccumulator || takes_window || purpose_ == Purpose::kAccumulate)) {
      row.state[k] = address(state);
      if (row.state[k] == nullptr) return "a state's storage is empty";
    }
  }
  if (row.numel > 0) {
    row.param = address(*host.impl);
    if (host.grad != nullptr) row.grad = address(*host.grad);
    if (row.param == nullptr) return "a parameter's storage is empty";
    if (host.grad != nullptr && row.grad == nullptr) return "a gradient's storage is empty";
    if (row.param == row.grad) return "a gradient is its parameter's own memory";
    if (host.grad != nullptr && plan_.zeroes_grads()) {
      copy_on_write = copy_on_write || is_copy_on_write(*host.grad);
    }
  }
  for (int k = 0; k < plan_.rule.scalar_states.count; ++k) {
    if (!host.has_scalar(k)) continue;
    const c10::TensorImpl& scalar = *host.states[kScalar + k];
    const auto type = c10::typeMetaToScalarType(scalar.dtype());
    const TablePlan& plan = plan_.table_of(host);
    const bool there = host.advances_there(k);
    if (scalar.key_set() != (there ? plan.plain_keys : plan_.host_keys) ||
        (there && scalar.device() != plan.device) || scalar.numel() != 1 ||
        (type != at::kFloat && type != at::kDouble)) {
      return "a step count has another dtype or device";
    }
    copy_on_write = copy_on_write || is_copy_on_write(scalar);
    void* at = host.scalar_at[k] = address(scalar);
    if (at == nullptr) return "a step count's storage is empty";
    const bool is_double = type == at::kDouble;
    host.doubles = (host.doubles & ~(1u << k)) | (is_double ? 1u << k : 0u);
    if (there) continue;
    host.scalars[k] = is_double ? *static_cast<double*>(at) : double(*static_cast<float*>(at));
  }
  host.copy_on_write = copy_on_write;
  return nullptr;
}

}  // namespace

void PlanRows::select(const std::optional<std::vector<int>>& selected) {
  if (selected) {  // whoever took part in the last step must not do so in this one unless named
    for (const int r : present()) {
      HostRow& host = rows[r];
      host.active = false;
      Row& row = row_of(host);
      row.grad = row.state[kAccumulator] = nullptr;
    }
    named = *selected;
  }
  names = selected.has_value();
}

const char* walk(PlanRows& plan, const py::list& param_groups, const py::dict& state,
                 Purpose purpose) {
  if (plan.has_other_options()) return "the optimizer's options changed";
  return Walk(plan, purpose).run(param_groups, state);
}

}  // namespace fusedopt
