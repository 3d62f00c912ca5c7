#pragma once

#include <ATen/core/Tensor.h>

namespace torchgraft::ops::cpu {

// (x - mean) inverse weight + bias in one pass. x [..., K], mean and inverse [..., 1], weight and bias [K] or
// undefined, all float32 -> contiguous, as x.
at::Tensor normalize(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& inverse, const at::Tensor& weight,
                     const at::Tensor& bias);

}  // namespace torchgraft::ops::cpu
