// Host buffers for batches, reused once no tensor in them is alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace fusedopt {

// Every leaf of a batch (images, labels, ...) has its own buffers, so a consumer who keeps the labels
// of an epoch does not keep its images. A buffer is free when the ring holds the only reference to its
// storage. Buffers are chosen under the GIL, so several threads may share a ring.
class Ring {
 public:
  // Keeps at most `slots` buffers for each leaf, in page-locked memory if `pinned`.
  Ring(int64_t slots, bool pinned);

  // Gathers `count` rows of every source: rows index[first], index[first + 1], ... or, if `index` is
  // undefined, rows first, first + 1, ... Releases the GIL while copying.
  std::vector<at::Tensor> gather(const std::vector<at::Tensor>& sources, const at::Tensor& index,
                                 int64_t first, int64_t count);

  // Copies tensors into buffers of the ring, in the same memory order. Releases the GIL.
  std::vector<at::Tensor> copy(const std::vector<at::Tensor>& tensors);

  // Number of buffers allocated so far; constant in steady state.
  int64_t allocations() const { return allocations_; }

 private:
  struct Slot {
    c10::Storage storage;
    const void* data;  // the storage's pointer when it was allocated

    bool free() const;
  };
  struct Leaf {
    std::vector<Slot> slots;
    size_t largest = 0;  // bytes of the largest batch so far
    size_t given = 0;    // number of buffers replaced while in use; chooses the next one, in turn
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
