#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace torchgraft::ops::cpu {

// (x - mean) inverse weight + bias in one pass. x [..., K], mean and inverse [..., 1], weight and bias [K] or
// undefined, all float32 -> contiguous, as x.
at::Tensor normalize(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& weight,
                     const at::Tensor& bias);

// (output, sum) of residual_norm (ops/residual_norm.h). x and residual [..., H] of one shape, contiguous, weight and
// bias [H] or undefined, all float32.
std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& residual,
                                                 const at::Tensor& weight, const at::Tensor& bias, double eps);

}  // namespace torchgraft::ops::cpu
