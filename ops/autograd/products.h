#pragma once

#include <torchgraft/ops/bank.h>

namespace torchgraft::ops {

// The products that gradients are made of: by fused kernels (ops/cpu/gradient_products.h) where kernel_choice.h takes
// them and all rows use one slice of the banks, else by ATen.

// grad [B, S, O] weight [(B,) O, R] -> [B, S, R]: the gradient of the narrow h in y = h weight^T.
at::Tensor narrow_product(const Selection& selection, const at::Tensor& grad, const at::Tensor& weight);

// Gradient of a selected weight in y = project(x, weight): grad_y [B, S, M], x [B, S, K] -> [(B,) M, K], summed over
// the batch in the uniform case.
at::Tensor weight_gradient(const Selection& selection, const at::Tensor& grad_y, const at::Tensor& x);

// A linear map that reads the same x as the operator's bank: the gradient of its result, [B, S, O], and its weight,
// [O, I].
struct LinearGradient {
  at::Tensor grad;  // undefined: there is none
  at::Tensor weight;
};

// The gradient of x [B, S, I]: grad weight of `linear` and narrow [B, S, R] narrow_weight [(B,) R, I]. Either may be
// undefined; if both are, the result is, too.
at::Tensor input_gradient(const Selection& selection, const LinearGradient& linear, const at::Tensor& narrow,
                          const at::Tensor& narrow_weight);

}  // namespace torchgraft::ops
