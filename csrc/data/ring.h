// The host buffers that batches of data are written to, used again once nobody holds them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace fusedopt {

// Every leaf of a batch (images, labels, ...) has buffers of its own, so that a consumer who keeps the
// labels of an epoch does not keep its images. A buffer belongs to whoever holds a tensor in it: it is
// free when the ring's is the last reference to its storage. The calls hold the GIL while they look for
// buffers, so several threads may share a ring.
class Ring {
 public:
  // At most `slots` buffers a leaf are kept; `pinned` ones are what a GPU can copy from by itself.
  Ring(int64_t slots, bool pinned);

  // Rows of every source, one after the other: those that `index` lists, or, where it is undefined,
  // `count` from `first` on. One pass over memory, without the GIL.
  std::vector<at::Tensor> gather(const std::vector<at::Tensor>& sources, const at::Tensor& index,
                                 int64_t first, int64_t count);

  // The same tensors in buffers of the ring, in the same memory order. Without the GIL.
  std::vector<at::Tensor> copy(const std::vector<at::Tensor>& tensors);

  // How many buffers were allocated so far: does not grow in steady state.
  int64_t allocations() const { return allocations_; }

 private:
  struct Slot {
    c10::Storage storage;
    const void* data;  // where it lay when it was allocated

    bool free() const;
  };
  struct Leaf {
    std::vector<Slot> slots;
    size_t largest = 0;  // bytes, of all batches so far
    size_t given = 0;    // slots whose buffers were left to their holders, counted on
  };

  at::Tensor take(size_t leaf, const at::Tensor& like, at::IntArrayRef sizes,
                  at::IntArrayRef strides);
  c10::Storage take_bytes(size_t leaf, size_t bytes);
  Slot allocate(size_t bytes);

  size_t most_;
  bool pinned_;
  std::vector<Leaf> leaves_;
  int64_t allocations_ = 0;
};

void bind_data(pybind11::module_& m);

}  // namespace fusedopt
