#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/linear.h>
#include <torchgraft/ops/linear.h>

namespace torchgraft::ops {
namespace {

// ATen's calls bring their own gradients, of any order and mode.
at::Tensor differentiable_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                 std::string_view non_linearity) {
  const bool is_recorded =
      at::GradMode::is_enabled() && (requires_grad(x) || requires_grad(weight) || requires_grad(bias));
  if (!is_recorded && !has_tangent(x) && !has_tangent(weight) && !has_tangent(bias)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear(x, weight, bias, non_linearity);
  }
  const auto args = as_struct<LinearArguments>(x, weight, bias, non_linearity);
  check(args);
  return composed_linear(args);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("linear", TORCH_FN(differentiable_linear)); }

}  // namespace
}  // namespace torchgraft::ops
