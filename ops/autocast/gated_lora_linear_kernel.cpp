#include <torch/library.h>
#include <torchgraft/ops/autocast/support.h>
#include <torchgraft/ops/gated_lora_linear.h>

namespace torchgraft::ops {
namespace {

template <c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor> gated_lora_linear_autocast(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  const Autocast<device> cast;
  return gated_lora_linear(cast(x), cast(weight), cast(bias), cast(lora_a), cast(lora_b), cast(scaling),
                           cast(gate_weight), cast(gate_bias), adapter_ids, adapter, token_mask);
}

TORCH_LIBRARY_IMPL(torchgraft, AutocastCPU, m) {
  m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_autocast<at::kCPU>));
}
TORCH_LIBRARY_IMPL(torchgraft, AutocastCUDA, m) {
  m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_autocast<at::kCUDA>));
}

}  // namespace
}  // namespace torchgraft::ops
