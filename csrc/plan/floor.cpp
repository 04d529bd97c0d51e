#include "plan/floor.h"

#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>

#include "core/floor.h"
#include "cpu/driver.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

TrafficFloor::TrafficFloor(const pybind11::list& rows, const pybind11::object& launcher)
    : keep_(rows) {
  table_.storage = {DType::kF32, DType::kF32, DType::kF32};
  table_.slot_size = sizeof(FloorSlot);
  table_.slots.resize(table_.slot_size);
  const FloorSlot slot{1.0f, {}};
  std::memcpy(table_.slots.data(), &slot, sizeof slot);
  size_t width = 0;
  for (const pybind11::handle list : rows) {
    std::vector<at::Tensor> arrays;
    for (const pybind11::handle tensor : list) {
      arrays.push_back(THPVariable_Unpack(tensor.ptr()));
    }
    if (width == 0) {
      width = arrays.size();
      if (!arrays.empty()) device_ = arrays[0].device();
    }
    bool good = arrays.size() == width && width >= 2 && width <= kMaxArrays;
    for (const at::Tensor& array : arrays) {
      good = good && array.key_set() == plain_keys(device_.type()) && array.device() == device_ &&
             array.is_contiguous() && array.nbytes() == arrays[0].nbytes() &&
             array.nbytes() % 4 == 0;
    }
    if (!good) {
      throw std::invalid_argument(
          "rows: every row must hold the same number (2 to 5) of contiguous tensors of equal size "
          "in bytes, a multiple of 4, all on one device");
    }
    Row& row = table_.rows.emplace_back();
    row.numel = static_cast<int64_t>(arrays[0].nbytes() / 4);
    row.param = arrays[0].mutable_data_ptr();
    row.grad = arrays[1].const_data_ptr();
    for (size_t k = 2; k < width; ++k) row.state[k - 2] = arrays[k].mutable_data_ptr();
  }
  table_.states = width == 0 ? 0 : static_cast<int>(width) - 2;
  if (launcher.is_none()) {
    table_.cut(kCpuChunkElements);
  } else {
    on_device_ = std::make_unique<TableOnDevice>(
        *launcher.cast<pybind11::capsule>().get_pointer<cuda::Launcher>(), device_, nullptr, 0,
        table_.storage, cuda::Scalars::kHost, 0);
    on_device_->ready(table_);
  }
}

void TrafficFloor::run() {
  if (on_device_ != nullptr) return on_device_->step(table_, {});
  const Kernel kernel = current_tier().floor(table_.states);
  const pybind11::gil_scoped_release no_gil;
  run_tables({{&table_, kernel}}, run_on_torch_pool);
}

}  // namespace fusedopt
