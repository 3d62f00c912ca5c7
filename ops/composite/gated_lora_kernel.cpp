#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_lora_kernel.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

at::Tensor lora_coefficient(const LoraArguments& args, const Selection& selection, const Gate& gate) {
  const at::Tensor scaling = select(selection, args.scaling).unsqueeze(-1).unsqueeze(-1);
  return gate.value.defined() ? gate.value.unsqueeze(-1) * scaling
                              : scaling.to(accumulation_type(args.x.scalar_type()));
}

LoraForward lora_forward(const LoraArguments& args, const Selection& selection) {
  LoraForward result;
  if (selection.kind != Selection::Kind::kBase && takes_fused_kernels(FusedOp::kLora, args.x)) {
    const cpu::TokenReading reading = cpu::read_tokens(args.x, {args.lora_a, {}}, args.rows, selection);
    result.gate = reading.gate;
    result.hidden = reading.hidden.to(args.x.scalar_type());
    result.output = cpu::expand(args.base, reading.hidden, {args.lora_b, {}, args.scaling}, result.gate, selection);
    return result;
  }
  result.output = at::clone(args.base, at::MemoryFormat::Contiguous);
  if (selection.kind == Selection::Kind::kBase) {
    return result;
  }
  result.gate = gate_forward(args.x, args.rows, selection);
  result.hidden = project(args.x, select(selection, args.lora_a));
  // The coefficient goes to the narrow side: r columns instead of O.
  const at::Tensor scaled = (result.hidden * lora_coefficient(args, selection, result.gate)).to(args.x.scalar_type());
  add_projection_(result.output, scaled, select(selection, args.lora_b));
  return result;
}

namespace {

std::tuple<at::Tensor, at::Tensor> gated_lora_composite(
    const at::Tensor& x, const at::Tensor& base, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  const LoraArguments args{x,      base,    lora_a,
                           lora_b, scaling, row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)};
  check(args);
  const Selection selection = resolve_selection("gated_lora", args.rows, lora_a, /*recording=*/false);
  const LoraForward forward = lora_forward(args, selection);
  return {forward.output, gate_result(forward.gate, x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) { m.impl("gated_lora", TORCH_FN(gated_lora_composite)); }
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) { m.impl("gated_lora", TORCH_FN(gated_lora_composite)); }

}  // namespace
}  // namespace torchgraft::ops
