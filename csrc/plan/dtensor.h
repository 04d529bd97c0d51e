// Distributed tensors: what a step on this rank updates of one is its local tensor.
//
// A step of an elementwise rule needs no communication as long as the parameter, its gradient and
// its states are cut alike: every rank updates the elements that it holds. torch.optim gets there
// through the dispatcher, which unwraps each operand of each operation; the plan unwraps each tensor
// once a step.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fusedopt {

namespace py = pybind11;

// What kernels see of a tensor. Borrowed from it.
struct Local {
  PyObject* tensor;  // of a DTensor its local tensor, of any other the tensor itself
  PyObject* spec;    // of a DTensor its mesh and placements, else null
};

// The one function that opens a DTensor. It changes no reference count and raises nothing, so that
// threads may call it while another one holds the GIL for them, once a plan has been built.
Local local_of(PyObject* tensor);

// Whether tensors of these specs (each may be null, for a tensor that is not distributed) have the
// same elements on every rank.
bool same_placement(PyObject* a, PyObject* b);

// Why a DTensor's local tensors do not tell what a step does, in words that end the sentence "it is
// stepped by torch.optim because". Empty for those that do, and for tensors that are not distributed.
std::string why_not_local(PyObject* param, PyObject* grad);

}  // namespace fusedopt
