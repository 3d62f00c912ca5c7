#include <ATen/core/dispatch/Dispatcher.h>
#include <torchgraft/ops/gated_lora_linear.h>

namespace torchgraft::ops {

std::tuple<at::Tensor, at::Tensor> gated_lora_linear(const at::Tensor& x, const at::Tensor& weight,
                                                     const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
                                                     const at::Tensor& lora_b, const at::Tensor& scaling,
                                                     const std::optional<at::Tensor>& gate_weight,
                                                     const std::optional<at::Tensor>& gate_bias,
                                                     const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
                                                     const std::optional<at::Tensor>& token_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchgraft::gated_lora_linear", "")
                             .typed<decltype(gated_lora_linear)>();
  return op.call(x, weight, bias, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

}  // namespace torchgraft::ops
