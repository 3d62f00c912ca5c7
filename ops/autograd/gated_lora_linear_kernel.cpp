#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/autograd/support.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>

namespace torchgraft::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_lora_linear_autograd(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  if (!records_gradient({x, weight, or_undefined(bias), lora_a, lora_b, scaling, or_undefined(gate_weight),
                         or_undefined(gate_bias)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return gated_lora_linear(x, weight, bias, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter,
                             token_mask);
  }
  check({x, {}, lora_a, lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)},
        weight, or_undefined(bias));
  return gated_lora(x, at::linear(x, weight, bias), lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids,
                    adapter, token_mask);
}

TORCH_LIBRARY_IMPL(torchgraft, Autograd, m) { m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_autograd)); }

}  // namespace
}  // namespace torchgraft::ops
