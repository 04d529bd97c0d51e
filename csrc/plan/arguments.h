// What Python hands over, checked for its type before it is opened: torch's own accessors trust it.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "plan/tensors.h"

namespace fusedopt {

[[noreturn]] inline void throw_unfit(const std::string& argument, PyObject* got,
                                     const char* wanted) {
  throw pybind11::type_error(argument + " is of type " + Py_TYPE(got)->tp_name + "; it must be " +
                             wanted);
}

// A tensor, of any class. `argument` names it in the TypeError.
inline const at::Tensor& tensor_of(PyObject* object, const std::string& argument) {
  if (!THPVariable_Check(object)) throw_unfit(argument, object, "a tensor");
  return THPVariable_Unpack(object);
}

// Throws TypeError unless a tensor is one real number that kernels can read.
inline void check_number(const at::Tensor& tensor, const std::string& argument) {
  if (tensor.layout() != at::kStrided || tensor.numel() != 1 || tensor.is_complex() ||
      !has_memory(tensor)) {
    throw pybind11::type_error(argument + " is a tensor of " + std::to_string(tensor.numel()) +
                               " elements, " + c10::toString(tensor.scalar_type()) + " on " +
                               tensor.device().str() +
                               "; it must be a number or a tensor of one, real and with memory");
  }
}

inline pybind11::dict dict_of(pybind11::handle object, const std::string& argument) {
  if (!PyDict_Check(object.ptr())) throw_unfit(argument, object.ptr(), "a dict");
  return pybind11::reinterpret_borrow<pybind11::dict>(object);
}

}  // namespace fusedopt
