#include "data/ring.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/COW.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "data/gather.h"
#include "plan/pool.h"

namespace fusedopt {

namespace {

namespace py = pybind11;

[[noreturn]] void throw_outside(int64_t index, int64_t position, int64_t rows) {
  throw py::index_error("index " + std::to_string(index) + " at position " +
                        std::to_string(position) + " of a batch is out of range for " +
                        std::to_string(rows) + " rows; wanted: 0 to " + std::to_string(rows - 1));
}

// Whether a tensor's values are in host memory, all of them: a storage may have been freed.
bool in_memory(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided && tensor.has_storage() &&
         at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                          static_cast<size_t>(tensor.storage_offset())) <=
             tensor.storage().nbytes();
}

bool has_contiguous_rows(const at::Tensor& source) {
  int64_t stride = 1;
  for (int64_t d = source.dim(); d-- > 1; stride *= source.size(d)) {
    if (source.size(d) != 1 && source.stride(d) != stride) return source.numel() == 0;
  }
  return true;
}

// The gather reads memory by these numbers, so they are checked, whoever calls it.
void check_gather(const std::vector<at::Tensor>& sources, const at::Tensor& index, int64_t first,
                  int64_t count) {
  if (sources.empty()) throw py::value_error("sources: got none");
  for (const at::Tensor& source : sources) {
    if (!in_memory(source) || source.dim() == 0 || source.size(0) != sources[0].size(0) ||
        !has_contiguous_rows(source)) {
      throw py::value_error(
          "sources: wanted dense tensors in host memory, with as many rows each, "
          "whose rows are contiguous; has a storage been freed?");
    }
  }
  if (index.defined() && (!in_memory(index) || index.scalar_type() != at::kLong ||
                          index.dim() != 1 || !index.is_contiguous())) {
    throw py::value_error("index: wanted a contiguous int64 vector in host memory");
  }
  const int64_t most = index.defined() ? index.size(0) : sources[0].size(0);
  if (first < 0 || count < 0 || first > most || count > most - first) {
    throw py::value_error("first, count: wanted rows that are there");
  }
}

}  // namespace

Ring::Ring(int64_t slots, bool pinned) : most_(std::max<int64_t>(slots, 1)), pinned_(pinned) {}

// The reference count of a storage does not cover other processes that share its memory (its data
// pointer has changed then) nor copy-on-write copies.
bool Ring::Slot::free() const {
  const c10::DataPtr& pointer = storage.data_ptr();
  if (storage.use_count() != 1 || pointer.get() != data) return false;
  if (c10::impl::cow::is_cow_data_ptr(pointer)) return false;
  // Order the last holder's reads, on any thread, before our writes.
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

Ring::Slot Ring::allocate(size_t bytes) {
  const auto options = at::TensorOptions(at::kByte).pinned_memory(pinned_);
  const c10::Storage storage = at::empty({static_cast<int64_t>(bytes)}, options).storage();
  ++allocations_;
  return {storage, storage.data_ptr().get()};
}

c10::Storage Ring::take_bytes(size_t leaf, size_t bytes) {
  if (leaves_.size() <= leaf) leaves_.resize(leaf + 1);
  Leaf& line = leaves_[leaf];
  line.largest = std::max(line.largest, bytes);
  Slot* small = nullptr;
  for (Slot& slot : line.slots) {  // from the first, which is most likely still in the caches
    if (!slot.free()) continue;
    if (slot.storage.nbytes() >= bytes) return slot.storage;
    small = &slot;
  }
  if (small == nullptr && line.slots.size() < most_) {
    line.slots.push_back(allocate(line.largest));
    return line.slots.back().storage;
  }
  // All are in use or too small: replace one. Tensors in it keep its old memory alive.
  Slot& slot = small != nullptr ? *small : line.slots[line.given++ % most_];
  slot = allocate(line.largest);
  return slot.storage;
}

at::Tensor Ring::take(size_t leaf, const at::Tensor& like, at::IntArrayRef sizes,
                      at::IntArrayRef strides) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * like.element_size();
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      take_bytes(leaf, bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

std::vector<at::Tensor> Ring::gather(const std::vector<at::Tensor>& sources,
                                     const at::Tensor& index, int64_t first, int64_t count) {
  check_gather(sources, index, first, count);
  const int64_t rows = sources[0].size(0);
  const int64_t* indices = index.defined() ? index.const_data_ptr<int64_t>() + first : nullptr;
  if (indices != nullptr) {
    const int64_t outside = first_outside(indices, count, rows);
    if (outside >= 0) throw_outside(indices[outside], outside, rows);
    first = 0;
  }
  std::vector<at::Tensor> batch;
  std::vector<RowSource> copies;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  for (size_t leaf = 0; leaf < sources.size(); ++leaf) {
    const at::Tensor& source = sources[leaf];
    sizes.assign(source.sizes().begin(), source.sizes().end());
    sizes[0] = count;
    strides.resize(sizes.size());
    int64_t elements = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = elements;
      elements *= d > 0 ? std::max<int64_t>(sizes[d], 1) : 1;
    }
    batch.push_back(take(leaf, source, sizes, strides));
    const auto item = static_cast<int64_t>(source.element_size());
    const int64_t row = rows > 0 ? source.numel() / rows * item : 0;
    copies.push_back({static_cast<const char*>(source.const_data_ptr()), source.stride(0) * item,
                      row, static_cast<char*>(batch.back().mutable_data_ptr())});
  }
  const py::gil_scoped_release no_gil;
  gather_rows(copies, indices, first, count, run_on_torch_pool);
  return batch;
}

std::vector<at::Tensor> Ring::copy(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> copies;
  for (size_t leaf = 0; leaf < tensors.size(); ++leaf) {
    const at::Tensor& tensor = tensors[leaf];
    if (!in_memory(tensor)) throw py::value_error("tensors: wanted dense ones, in host memory");
    const auto strides = at::infer_dense_strides(tensor.sizes(), tensor.strides());
    copies.push_back(take(leaf, tensor, tensor.sizes(), strides));
  }
  const py::gil_scoped_release no_gil;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (size_t leaf = 0; leaf < tensors.size(); ++leaf) copies[leaf].copy_(tensors[leaf]);
  return copies;
}

void bind_data(py::module_& m) {
  py::class_<Ring>(m, "Ring")
      .def(py::init<int64_t, bool>(), py::arg("slots"), py::arg("pinned"))
      .def(
          "gather",
          [](Ring& self, const std::vector<at::Tensor>& sources,
             const std::optional<at::Tensor>& index, int64_t first, int64_t count) {
            return self.gather(sources, index.value_or(at::Tensor()), first, count);
          },
          py::arg("sources"), py::arg("index"), py::arg("first"), py::arg("count"))
      .def("copy", &Ring::copy, py::arg("tensors"))
      .def_property_readonly("allocations", &Ring::allocations);
}

}  // namespace fusedopt
