// Reading a param group: hyperparameters by name, whatever numeric type the user gave them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/registry.h"

namespace fusedopt {

namespace py = pybind11;

struct GroupValues {
  HyperValues hyper;
  bool maximize = false;
  unsigned route_flags = 0;  // the flags that decide whether kernels may take the group, as bits
};

class GroupReader {
 public:
  explicit GroupReader(const RuleInfo& rule);

  // Throws KeyError for a missing key and TypeError for a value that is no number, naming the key.
  GroupValues read(const py::dict& group) const;

  PyObject* params_key() const { return params_key_.ptr(); }

 private:
  struct Key {
    py::str name;
    int index;
  };
  std::vector<Key> keys_;
  std::vector<py::str> route_keys_;
  py::str maximize_key_;
  py::str params_key_;
};

}  // namespace fusedopt
