#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/products.h>
#include <torchgraft/ops/cpu/gradient_products.h>
#include <torchgraft/ops/kernel_choice.h>

#include <algorithm>

namespace torchgraft::ops {
namespace {

// Wider products are left to ATen.
constexpr int64_t kNarrow = 128;

bool takes_fused(const Selection& selection, std::initializer_list<at::Tensor> factors) {
  return !selection.is_mixed() && std::all_of(factors.begin(), factors.end(),
                                              [](const at::Tensor& factor) { return takes_fused_kernels(factor); });
}

bool takes_fused(const Selection& selection, const LinearGradient& linear) {
  return takes_fused(selection, {linear.grad, linear.weight}) &&
         cpu::suits_linear_gradient(linear.weight, linear.grad.size(0) * linear.grad.size(1));
}

bool is_narrow(const at::Tensor& factor, int64_t dim) { return factor.size(dim) <= kNarrow; }

}  // namespace

at::Tensor narrow_product(const Selection& selection, const at::Tensor& grad, const at::Tensor& weight) {
  if (takes_fused(selection, {grad, weight}) && is_narrow(weight, 1)) {
    return cpu::narrow_product(grad, weight).to(grad.scalar_type());
  }
  return at::matmul(grad, weight);
}

at::Tensor weight_gradient(const Selection& selection, const at::Tensor& grad_y, const at::Tensor& x) {
  if (selection.is_mixed()) {
    return at::bmm(grad_y.transpose(1, 2), x);
  }
  if (takes_fused(selection, {grad_y, x}) && (is_narrow(grad_y, 2) || is_narrow(x, 2))) {
    return cpu::token_sum(grad_y, x).to(x.scalar_type());
  }
  return at::mm(grad_y.flatten(0, 1).t(), x.flatten(0, 1));
}

at::Tensor input_gradient(const Selection& selection, const LinearGradient& linear, const at::Tensor& narrow,
                          const at::Tensor& narrow_weight) {
  if (!linear.grad.defined()) {
    if (!narrow.defined()) {
      return {};
    }
    const bool fused = takes_fused(selection, {narrow, narrow_weight}) && is_narrow(narrow, 2);
    return fused ? cpu::wide_product(narrow, narrow_weight) : at::matmul(narrow, narrow_weight);
  }
  if (takes_fused(selection, linear) && (!narrow.defined() || takes_fused(selection, {narrow, narrow_weight}))) {
    return cpu::linear_gradient(linear.grad, linear.weight, narrow, narrow_weight);
  }
  at::Tensor sum = at::matmul(linear.grad, linear.weight);
  if (narrow.defined()) {
    add_projection_(sum, narrow, narrow_weight.transpose(-1, -2));
  }
  return sum;
}

}  // namespace torchgraft::ops
