#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_lora_linear_kernel.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

LoraForward lora_linear_forward(const LoraArguments& args, const at::Tensor& weight, const at::Tensor& bias,
                                const Selection& selection) {
  if (takes_fused_kernels(FusedOp::kLoraLinear, args.x) && cpu::is_read_in_place(weight, args.x.size(1))) {
    return cpu::lora_projection(weight, bias, args, selection);
  }
  LoraArguments with_base = args;
  with_base.base = at::linear(args.x, weight, bias.defined() ? std::make_optional(bias) : std::nullopt);
  return lora_forward(with_base, selection);
}

namespace {

std::tuple<at::Tensor, at::Tensor> gated_lora_linear_composite(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  const LoraArguments args{x,      {},      lora_a,
                           lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
  check(args, weight, or_undefined(bias));
  const Selection selection = resolve_selection("gated_lora_linear", args.rows, lora_a, /*recording=*/false);
  const LoraForward forward = lora_linear_forward(args, weight, or_undefined(bias), selection);
  return {forward.output, gate_result(forward.gate, x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) { m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_composite)); }
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) { m.impl("gated_lora_linear", TORCH_FN(gated_lora_linear_composite)); }

}  // namespace
}  // namespace torchgraft::ops
