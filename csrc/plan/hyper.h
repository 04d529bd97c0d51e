// Reading a param group: hyperparameters by name, whatever numeric type the user gave them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "core/registry.h"

namespace fusedopt {

namespace py = pybind11;

struct GroupValues {
  HyperValues hyper;
  at::Tensor live[kMaxHyper];  // values that are left in tensors; 1 stands for them in `hyper`
  bool maximize = false;
  unsigned route_flags = 0;
};

// Which tensors among the values stay tensors, for kernels that read them where they are.
enum class LiveTensors { kNone, kOffHost, kAll };

// Flags of a group that decide who updates it and where its scalars are computed, as bits.
enum RouteFlag : unsigned { kDifferentiable = 1, kCapturable = 2, kFused = 4 };

class GroupReader {
 public:
  explicit GroupReader(const RuleInfo& rule);

  // Throws KeyError for a missing key, TypeError for a value that is no number and ValueError for a
  // sequence of another length, naming the key.
  GroupValues read(const py::dict& group, LiveTensors live) const;

  PyObject* params_key() const { return params_key_.ptr(); }

  // Whether `read` looks at this key of a group. Throws ValueError for an option of the optimizer,
  // which would be ignored there.
  bool reads(PyObject* key) const;

 private:
  struct Key {
    py::str name;
    int index;
    int count = 0;  // elements of the sequence that `index` is a place in
  };
  std::vector<Key> keys_;
  std::vector<py::str> route_keys_;
  py::str maximize_key_;
  py::str params_key_;
};

// A group's entries as they were last read. A step mostly finds the same objects again, and those
// that never change, as floats and tuples of them, need not be read again.
class SeenGroup {
 public:
  // Whether `read` may find something else than it did before the last `keep`.
  bool changed(const py::dict& group, const GroupReader& reader);

  // What `changed` saw has been read, without an error.
  void keep();

 private:
  struct Entry {
    py::object key;
    py::object value;  // null where it is not read: nothing else is kept alive
    bool is_read = false;
  };
  std::vector<Entry> entries_;
  bool kept_ = false;
};

}  // namespace fusedopt
