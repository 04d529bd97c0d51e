#include "plan/tensors.h"

#include <algorithm>
#include <numeric>

namespace fusedopt {

std::optional<DType> storage_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kComplexFloat:
      return DType::kF32;
    case at::kDouble:
    case at::kComplexDouble:
      return DType::kF64;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

int64_t components(const at::Tensor& tensor) { return tensor.is_complex() ? 2 : 1; }

bool has_memory(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  if (!tensor.has_storage()) return false;
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto bytes = static_cast<size_t>(last + 1) * tensor.element_size();
  return tensor.storage().data() != nullptr && tensor.storage().nbytes() >= bytes;
}

c10::DispatchKeySet plain_keys(c10::DeviceType device) {
  const c10::DispatchKeySet dense(
      c10::computeDispatchKey(std::nullopt, at::kStrided, c10::Device(device)));
  const c10::BackendComponent backend = dense.highestBackendKey();
  return dense | c10::getAutocastRelatedKeySetFromBackend(backend) |
         c10::getAutogradRelatedKeySetFromBackend(backend);
}

bool same_layout(c10::IntArrayRef sizes, c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a == b) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  }
  return true;
}

namespace {

// Dimensions of more than one element, outermost in memory first.
std::vector<int64_t> memory_order(const at::Tensor& tensor) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  return dims;
}

// Whether two indices may name one memory location. Exact for expanded and sliced tensors; other
// interleavings (as_strided windows) count as overlapping.
bool may_overlap_itself(const at::Tensor& tensor) {
  int64_t extent = 1;
  const std::vector<int64_t> dims = memory_order(tensor);
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (tensor.stride(*d) < extent) return true;
    extent = tensor.stride(*d) * (tensor.size(*d) - 1) + extent;
  }
  return false;
}

bool is_plain_on(c10::Device device, const at::Tensor& tensor) {
  return tensor.key_set() == plain_keys(device.type()) && tensor.device() == device;
}

std::string describe_unplain(const at::Tensor& tensor, const std::string& what,
                             c10::Device device) {
  if (tensor.layout() != at::kStrided) {
    return what + " is sparse";
  }
  if (tensor.device() != device) {
    return what + " is on device " + tensor.device().str() + ", the parameter on " + device.str();
  }
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) return what + " is a tensor subclass";
  if (tensor.is_inference()) return what + " was created in inference mode";
  if (tensor.is_conj() || tensor.is_neg()) return what + " is lazily conjugated or negated";
  return what + " is not a dense strided tensor";
}

}  // namespace

std::string why_not_fused(const at::Tensor& param, const at::Tensor& grad) {
  const c10::Device device = param.device();
  if (!is_plain_on(device, param)) return describe_unplain(param, "the parameter", device);
  if (!storage_dtype(param)) {
    return std::string("its dtype is ") + at::toString(param.scalar_type());
  }
  if (may_overlap_itself(param)) return "several of its elements share one memory location";
  if (!has_memory(param)) return "its storage is empty";
  if (!grad.defined()) return "";
  if (!is_plain_on(device, grad)) return describe_unplain(grad, "its gradient", device);
  if (!storage_dtype(grad) || components(grad) != components(param)) {
    return std::string("its gradient's dtype is ") + at::toString(grad.scalar_type());
  }
  if (grad.sizes() != param.sizes()) return "its gradient has another shape";
  if (!has_memory(grad)) return "its gradient's storage is empty";
  if (param.numel() > 0 && grad.const_data_ptr() == param.const_data_ptr()) {
    return "its gradient is the parameter's own memory";
  }
  return "";
}

std::string why_state_unfit(const at::Tensor& param, const at::Tensor& state) {
  const c10::Device device = param.device();
  if (!is_plain_on(device, state)) return describe_unplain(state, "a state", device);
  if (!storage_dtype(state) || components(state) != components(param)) {
    return std::string("a state's dtype is ") + at::toString(state.scalar_type());
  }
  if (state.sizes() != param.sizes()) return "a state has another shape";
  if (may_overlap_itself(state)) return "several elements of a state share one memory location";
  if (!has_memory(state)) return "a state's storage is empty";
  return "";
}

std::optional<Layout> strided_layout(const std::vector<at::Tensor>& arrays) {
  const at::Tensor& param = arrays[0];
  bool linear = param.is_non_overlapping_and_dense();
  for (const at::Tensor& array : arrays) {
    if (!array.defined()) continue;
    linear = linear && same_layout(param.sizes(), param.strides(), array.strides());
  }
  if (linear) return std::nullopt;

  // Walk in the parameter's memory order, with neighbouring dimensions joined where every array
  // allows it, so that inner loops are as long as they can be.
  Layout layout;
  const auto joins = [&](int64_t outer, int64_t inner) {
    return std::all_of(arrays.begin(), arrays.end(), [&](const at::Tensor& array) {
      return !array.defined() || array.stride(outer) == array.stride(inner) * array.size(inner);
    });
  };
  const int64_t unit = components(param);
  int64_t previous = -1;
  for (const int64_t d : memory_order(param)) {
    if (previous >= 0 && joins(previous, d)) {
      layout.sizes.back() *= param.size(d);
      for (size_t a = 0; a < arrays.size(); ++a) {
        if (arrays[a].defined()) layout.strides[a].back() = arrays[a].stride(d) * unit;
      }
    } else {
      layout.sizes.push_back(param.size(d));
      for (size_t a = 0; a < arrays.size(); ++a) {
        layout.strides[a].push_back(arrays[a].defined() ? arrays[a].stride(d) * unit : 0);
      }
    }
    previous = d;
  }
  if (unit > 1 || layout.sizes.empty()) {
    layout.sizes.push_back(unit);
    for (size_t a = 0; a < arrays.size(); ++a) layout.strides[a].push_back(1);
  }
  return layout;
}

std::vector<int> overlapping_rows(const std::vector<std::vector<at::Tensor>>& rows) {
  struct Extent {
    const char* begin;
    const char* end;
    int row;
  };
  std::vector<Extent> extents;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (const at::Tensor& tensor : rows[r]) {
      if (tensor.numel() == 0) continue;
      int64_t last = 0;  // the element that lies highest in memory; strides are never negative
      for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
      const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
      const auto size = static_cast<int64_t>(tensor.element_size());
      extents.push_back({begin, begin + (last + 1) * size, static_cast<int>(r)});
    }
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<int> found;
  const Extent* reach = nullptr;  // of the extents so far, the one that ends last
  for (const Extent& extent : extents) {
    if (reach != nullptr && extent.begin < reach->end) {
      found.push_back(reach->row);
      found.push_back(extent.row);
    }
    if (reach == nullptr || extent.end > reach->end) reach = &extent;
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

}  // namespace fusedopt
