#include <ATen/core/dispatch/Dispatcher.h>
#include <torchgraft/ops/gated_bottleneck_linear.h>

namespace torchgraft::ops {

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchgraft::gated_bottleneck_linear", "")
                             .typed<decltype(gated_bottleneck_linear)>();
  return op.call(x, input, weight, bias, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                 gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

}  // namespace torchgraft::ops
