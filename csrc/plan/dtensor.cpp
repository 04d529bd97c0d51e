#include "plan/dtensor.h"

#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fusedopt {

namespace {

// torch's class, and where its instances keep what we read of them: it declares both in __slots__.
struct DTensorClass {
  PyTypeObject* type = nullptr;  // null as long as nobody has imported it
  Py_ssize_t local = 0;
  Py_ssize_t spec = 0;
};

// The offset of a slot in instances, 0 if the class does not have it as a slot.
Py_ssize_t slot_offset(const py::object& type, const char* name) {
  const auto slot = py::getattr(type, name, py::none());
  if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) return 0;
  return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
}

const DTensorClass& dtensor_class() {
  static DTensorClass found;
  if (found.type != nullptr) return found;
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
  if (module == nullptr) return found;
  const py::object type = py::getattr(module, "DTensor", py::none());
  if (!PyType_Check(type.ptr())) return found;  // its import is still under way
  const Py_ssize_t local = slot_offset(type, "_local_tensor");
  const Py_ssize_t spec = slot_offset(type, "_spec");
  // A torch that keeps them elsewhere: a subclass that is not understood.
  if (local == 0 || spec == 0) return found;
  found = {reinterpret_cast<PyTypeObject*>(type.ptr()), local, spec};
  return found;
}

PyObject* read_slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

bool has_partial(PyObject* spec) {
  for (const py::handle placement : py::handle(spec).attr("placements")) {
    if (placement.attr("is_partial")().cast<bool>()) return true;
  }
  return false;
}

}  // namespace

Local local_of(PyObject* tensor) {
  const Local itself{tensor, nullptr};
  if (THPVariable_CheckExact(tensor)) return itself;
  const DTensorClass& dtensor = dtensor_class();
  if (Py_TYPE(tensor) != dtensor.type) return itself;
  PyObject* local = read_slot(tensor, dtensor.local);
  PyObject* spec = read_slot(tensor, dtensor.spec);
  // A subclass inside, such as the result of a collective that nobody has waited for, is torch's.
  if (local == nullptr || spec == nullptr || !THPVariable_CheckExact(local)) return itself;
  return {local, spec};
}

bool same_placement(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (a == nullptr || b == nullptr) return false;
  const auto same = [&](const char* name) {
    const py::object missing = py::none();  // in an older torch
    return py::getattr(a, name, missing).equal(py::getattr(b, name, missing));
  };
  return same("placements") && same("mesh") && same("shard_order");
}

std::string why_not_local(PyObject* param, PyObject* grad) {
  PyObject* spec = local_of(param).spec;
  PyObject* grad_spec = grad == Py_None ? spec : local_of(grad).spec;
  if (spec == nullptr && grad_spec == nullptr) return "";
  if (spec != nullptr && grad_spec == nullptr) return "its gradient is not a DTensor it can read";
  if (!same_placement(spec, grad_spec)) {
    return "its gradient is distributed over the ranks in another way";
  }
  if (has_partial(spec)) return "its ranks hold partial sums of it";
  return "";
}

}  // namespace fusedopt
