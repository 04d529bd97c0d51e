// What the plan asks of a torch tensor: can kernels walk its memory, and in which order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "core/table.h"

namespace fusedopt {

// The storage type a tensor's elements are processed as; complex numbers are pairs of real ones.
std::optional<DType> storage_dtype(const at::Tensor& tensor);

// Elements of the storage type an element of the tensor consists of: 2 for complex types, else 1.
int64_t components(const at::Tensor& tensor);

// Whether all elements lie in the tensor's storage: one that was freed or shrunk has them no more.
bool has_memory(const at::Tensor& tensor);

// The dispatch keys of a dense tensor in torch's plain representation: not sparse, quantized, nested,
// lazily conjugated or negated, wrapped by a subclass, or created in inference mode.
c10::DispatchKeySet plain_keys(c10::DeviceType device);

// The same memory order, index for index (strides of dimensions of length 1 mean nothing).
bool same_layout(c10::IntArrayRef sizes, c10::IntArrayRef a, c10::IntArrayRef b);

// Why kernels for the parameter's device cannot update this parameter from this gradient (undefined:
// any gradient), in words that end the sentence "it is stepped by torch.optim because". Empty when they can.
std::string why_not_fused(const at::Tensor& param, const at::Tensor& grad);

// Why a state tensor does not fit its parameter; empty when it does.
std::string why_state_unfit(const at::Tensor& param, const at::Tensor& state);

// The walk for arrays [param, grad, states...], undefined where a row has none, that do not all run through memory in one order; none
// when they do, the parameter without gaps.
std::optional<Layout> strided_layout(const std::vector<at::Tensor>& arrays);

// The rows (each a list of tensors that a step writes) that share memory with another row.
std::vector<int> overlapping_rows(const std::vector<std::vector<at::Tensor>>& rows);

}  // namespace fusedopt
