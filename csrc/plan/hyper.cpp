#include "plan/hyper.h"

#include <algorithm>
#include <string>

#include "plan/arguments.h"

namespace fusedopt {

namespace {

// Interned, so that a lookup compares pointers before strings.
py::str interned(const char* text) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text));
}

// A number of any kind: Python's, NumPy's, or a tensor of one element, which may be left live.
double number(PyObject* value, const py::str& key, LiveTensors live, at::Tensor& tensor_left) {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    check_number(tensor, "param group value '" + std::string(key) + "'");
    const bool stays = live == LiveTensors::kOffHost ? !tensor.is_cpu() : live == LiveTensors::kAll;
    if (!stays) return tensor.item().toDouble();
    tensor_left = tensor;
    return 1.0;
  } else {
    const double result = PyFloat_AsDouble(value);
    if (PyErr_Occurred() == nullptr) return result;
    PyErr_Clear();
  }
  throw py::type_error("param group value '" + std::string(key) + "' is " +
                       std::string(py::repr(py::handle(value))) +
                       "; it must be a number or a tensor of one element");
}

// Whether an object has the same value for good.
bool is_constant(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!PyFloat_CheckExact(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) ||
         value == Py_None;
}

// What optimizers take once for all their groups: the fields of Options in Python.
constexpr const char* kOptions[] = {"backend",
                                    "state_dtype",
                                    "max_grad_norm",
                                    "skip_nonfinite",
                                    "ema_decay",
                                    "zero_grads",
                                    "accumulation_steps",
                                    "accumulation_reduction",
                                    "accumulation_dtype",
                                    "norm_group"};

bool truth(PyObject* value) {
  if (value == Py_False || value == Py_None) return false;
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

}  // namespace

GroupReader::GroupReader(const RuleInfo& rule)
    : maximize_key_(interned("maximize")), params_key_(interned("params")) {
  for (const HyperName& name : rule.hyper_names) {
    keys_.push_back({interned(name.key), name.index});
  }
  for (Key& key : keys_) {
    for (const Key& other : keys_) key.count += other.name.is(key.name) ? 1 : 0;
  }
  // In the order of RouteFlag.
  for (const char* name : {"differentiable", "capturable", "fused"}) {
    route_keys_.push_back(interned(name));
  }
}

GroupValues GroupReader::read(const py::dict& group, LiveTensors live) const {
  GroupValues values;
  for (size_t k = 0; k < keys_.size(); ++k) {
    PyObject* value = PyDict_GetItemWithError(group.ptr(), keys_[k].name.ptr());
    if (value == nullptr) throw py::key_error(std::string(keys_[k].name));
    if (keys_[k].index < 0) {
      values.hyper.values[k] = number(value, keys_[k].name, live, values.live[k]);
    } else {
      const auto elements = py::reinterpret_steal<py::object>(PySequence_Tuple(value));
      if (!elements) throw py::error_already_set();
      if (PyTuple_GET_SIZE(elements.ptr()) != keys_[k].count) {
        throw py::value_error("param group value '" + std::string(keys_[k].name) + "' is " +
                              std::string(py::repr(py::handle(value))) + "; it must have " +
                              std::to_string(keys_[k].count) + " entries");
      }
      PyObject* element = PyTuple_GET_ITEM(elements.ptr(), keys_[k].index);
      values.hyper.values[k] = number(element, keys_[k].name, live, values.live[k]);
    }
  }
  PyObject* maximize = PyDict_GetItemWithError(group.ptr(), maximize_key_.ptr());
  values.maximize = maximize != nullptr && truth(maximize);
  for (size_t f = 0; f < route_keys_.size(); ++f) {
    PyObject* flag = PyDict_GetItemWithError(group.ptr(), route_keys_[f].ptr());
    if (flag != nullptr && truth(flag)) values.route_flags |= 1u << f;
  }
  return values;
}

bool GroupReader::reads(PyObject* key) const {
  const auto is = [key](const py::str& name) {
    const int same = PyObject_RichCompareBool(name.ptr(), key, Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same != 0;
  };
  for (const char* option : kOptions) {
    if (!is(interned(option))) continue;
    throw py::value_error("param group key '" + std::string(option) +
                          "' is an option of the whole optimizer, and would be ignored in a group: "
                          "give it to the constructor, or set the optimizer's attribute");
  }
  return std::any_of(keys_.begin(), keys_.end(), [&](const Key& k) { return is(k.name); }) ||
         std::any_of(route_keys_.begin(), route_keys_.end(), is) || is(maximize_key_);
}

bool SeenGroup::changed(const py::dict& group, const GroupReader& reader) {
  bool same = kept_;
  kept_ = false;                     // an error may come in between
  std::vector<py::object> replaced;  // whose ends may run code, which must not come in between
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  size_t k = 0;
  while (PyDict_Next(group.ptr(), &position, &key, &value) != 0) {
    if (k == entries_.size()) entries_.emplace_back();
    Entry& entry = entries_[k++];
    if (entry.key.ptr() != key) {
      same = false;
      const bool is_read = reader.reads(key);  // first: a key that is refused stays unknown
      replaced.push_back(std::move(entry.key));
      entry.key = py::reinterpret_borrow<py::object>(key);
      entry.is_read = is_read;
    }
    PyObject* wanted = entry.is_read ? value : nullptr;
    if (entry.value.ptr() == wanted) continue;
    same = false;
    replaced.push_back(std::move(entry.value));
    entry.value = py::reinterpret_borrow<py::object>(wanted);
  }
  if (k != entries_.size()) {
    same = false;
    entries_.resize(k);
  }
  kept_ = same;
  return !same;
}

void SeenGroup::keep() {
  kept_ = std::all_of(entries_.begin(), entries_.end(), [](const Entry& entry) {
    return !entry.is_read || is_constant(entry.value.ptr());
  });
}

}  // namespace fusedopt
