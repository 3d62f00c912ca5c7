#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <torchgraft/registration/export.h>

#include <optional>
#include <tuple>

namespace torchgraft::ops {

// What a block adds to the residual stream, and the layer norm behind it (Ba et al. 2016), as torch.nn.functional has
// it:
//   sum = x + residual
//   output = (sum - mean) / sqrt(variance + eps) weight + bias
// with mean and variance over the last dimensions, whose sizes are normalized_shape.
//
// x and residual broadcast against each other and may have different dtypes, as in ATen's add; weight and bias of shape
// normalized_shape, or absent. Returns (output, sum) in the dtypes that ATen's calls give. Where no gradients are
// recorded, a fused CPU kernel (ops/cpu/normalize.h) computes contiguous float32 tensors of one shape over their last
// dimension; elsewhere it is ATen's two calls, with their gradients, and their choice of dtypes under autocast. Throws
// c10::Error on wrong shapes and layouts.
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& residual,
                                                                c10::SymIntArrayRef normalized_shape,
                                                                const std::optional<at::Tensor>& weight = std::nullopt,
                                                                const std::optional<at::Tensor>& bias = std::nullopt,
                                                                double eps = 1e-5);

}  // namespace torchgraft::ops
