#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_lora_linear_meta(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  check({x, {}, lora_a, lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)},
        weight, or_undefined(bias));
  return {at::empty_symint({x.sym_size(0), x.sym_size(1), weight.sym_size(0)}, x.options()),
          at::empty_symint({x.sym_size(0), 1}, x.options())};
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) { m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_meta)); }

}  // namespace
}  // namespace torchgraft::ops
