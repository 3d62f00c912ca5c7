#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_bottleneck_linear.h>

namespace torchgraft::ops {
namespace {

// Where gradients are recorded it is two calls, each with a gradient of its own: there is nothing that the two share.
std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear_autograd(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({x, input, weight, or_undefined(bias), down_weight, down_bias, up_weight, up_bias, scaling,
                         or_undefined(gate_weight), or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_bottleneck_linear(x, input, weight, bias, down_weight, down_bias, up_weight, up_bias, scaling,
                                   non_linearity, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
  }
  const BottleneckArguments args =
      bottleneck_arguments(x, {}, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                           row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask));
  // So that errors name this op.
  check(args, input, weight, or_undefined(bias));
  resolve_selection("gated_bottleneck_linear", args.rows, down_weight, /*recording=*/true);
  return gated_bottleneck(x, at::linear(input, weight, bias), down_weight, down_bias, up_weight, up_bias, scaling,
                          non_linearity, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) {
  m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_autograd));
}

}  // namespace
}  // namespace torchgraft::ops
