#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/residual_norm.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/residual_norm.h>

namespace torchgraft::ops {
namespace {

// ATen's calls bring their own gradients, of any order and mode.
std::tuple<at::Tensor, at::Tensor> differentiable_residual_norm(const at::Tensor& x, const at::Tensor& residual,
                                                                c10::SymIntArrayRef normalized_shape,
                                                                const std::optional<at::Tensor>& weight,
                                                                const std::optional<at::Tensor>& bias, double eps) {
  const bool is_recorded = at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(residual) ||
                                                          requires_grad(weight) || requires_grad(bias));
  if (!is_recorded && !has_tangent(x) && !has_tangent(residual) && !has_tangent(weight) && !has_tangent(bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return residual_norm(x, residual, normalized_shape, weight, bias, eps);
  }
  const auto args = as_struct<ResidualNormArguments>(x, residual, normalized_shape, weight, bias, eps);
  check(args);
  return composed_residual_norm(args);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("residual_norm", TORCH_FN(differentiable_residual_norm)); }

}  // namespace
}  // namespace torchgraft::ops
