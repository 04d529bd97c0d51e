#include "plan/floor.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>

#include "core/floor.h"
#include "cpu/driver.h"
#include "plan/pool.h"
#include "plan/tensors.h"

namespace fusedopt {

TrafficFloor::TrafficFloor(const pybind11::list& rows, const pybind11::object& launcher,
                           bool measures, bool zero_grads)
    : keep_(rows), measures_(measures), zero_grads_(zero_grads) {
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
    row.grad =
        zero_grads ? arrays[1].mutable_data_ptr() : const_cast<void*>(arrays[1].const_data_ptr());
    row.norm_block = blocks_;
    blocks_ += norm_blocks(row.numel);
    for (size_t k = 2; k < width; ++k) row.state[k - 2] = arrays[k].mutable_data_ptr();
  }
  table_.states = width == 0 ? 0 : static_cast<int>(width) - 2;
  sums_ = at::zeros(
      {blocks_ * static_cast<int64_t>(sizeof(NormSums)) + static_cast<int64_t>(sizeof(Verdict))},
      at::TensorOptions(at::kByte).device(device_));
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
  auto* sums = static_cast<NormSums*>(sums_.data_ptr());
  const Pass pass{nullptr, zero_grads_ ? 1 : 0};
  if (on_device_ != nullptr) {
    const Board board = on_device_->upload(table_, {});
    auto* verdict = reinterpret_cast<Verdict*>(sums + blocks_);
    if (measures_) on_device_->norm(board, table_, {{sums, blocks_, nullptr, verdict, 1, 0}, {}});
    on_device_->floor(board, table_, pass);
    return;
  }
  const Tier& tier = current_tier();
  const Work read{&table_, tier.read_floor(), Work::Kind::kNorm, {}, sums};
  const Work move{&table_, tier.floor(table_.states), Work::Kind::kUpdate, pass};
  const pybind11::gil_scoped_release no_gil;
  if (measures_) run_tables({read}, run_on_torch_pool);
  run_tables({move}, run_on_torch_pool);
}

}  // namespace fusedopt
