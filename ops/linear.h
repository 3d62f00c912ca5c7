#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <optional>
#include <string_view>

namespace torchgraft::ops {

// A linear map and the function that follows it element by element:
//   output = non_linearity(x weight^T + bias)
//
// x [..., I], weight [O, I], bias [O] or absent, all in one of float32, float64, bfloat16, float16 and on one device;
// non_linearity: a name of non_linearity_names() ("linear": none). Returns [..., O] (contiguous) in x's dtype. Where no
// gradients are recorded and kernel_choice.h takes it, a fused CPU kernel (ops/cpu/projection.h) computes it; elsewhere
// it is ATen's two calls, with their gradients. Throws c10::Error on wrong shapes, dtypes and devices.
TORCHGRAFT_API at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias = std::nullopt,
                                 std::string_view non_linearity = "linear");

}  // namespace torchgraft::ops
