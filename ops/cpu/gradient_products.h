#pragma once

#include <ATen/core/Tensor.h>

namespace torchgraft::ops::cpu {

// The products that the gradients of LoRAs and bottlenecks are made of, for tokens [B, S, ...] that all use one
// slice of the banks (which is given). float32 or bfloat16 each; sums are float32. One side is narrow: R of them.

// grad [B, S, O] weight [O, R] -> [B, S, R] float32
at::Tensor narrow_product(const at::Tensor& grad, const at::Tensor& weight);

// left [B, S, M] and right [B, S, K], one of them narrow -> left^T right, summed over all tokens: [M, K] float32
at::Tensor token_sum(const at::Tensor& left, const at::Tensor& right);

// narrow [B, S, R] weight [R, I] -> [B, S, I], of the dtype of `weight`
at::Tensor wide_product(const at::Tensor& narrow, const at::Tensor& weight);

// Whether linear_gradient is faster than ATen's product with `weight` [O, I], for so many tokens: where it need not
// copy the weight, or where ATen's products of bfloat16 take far longer than a copy (the processor has none itself).
bool suits_linear_gradient(const at::Tensor& weight, int64_t tokens);

// grad [B, S, O] weight [O, I] + narrow [B, S, R] narrow_weight [R, I] -> [B, S, I], of the dtype of `grad`, in one
// pass. narrow may be undefined: then nothing is added. The weights have the same dtype.
at::Tensor linear_gradient(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& narrow,
                           const at::Tensor& narrow_weight);

}  // namespace torchgraft::ops::cpu
