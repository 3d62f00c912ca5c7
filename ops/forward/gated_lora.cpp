#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/forward/gated_lora.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

at::Tensor lora_coefficient(const at::Tensor& scaling, const Selection& selection, const Gate& gate,
                            at::ScalarType type) {
  const at::Tensor selected = select(selection, scaling).unsqueeze(-1).unsqueeze(-1);
  return gate.value.defined() ? gate.value.unsqueeze(-1) * selected : selected.to(accumulation_type(type));
}

LoraForward lora_forward(const LoraArguments& args, const Selection& selection) {
  LoraForward result;
  if (selection.kind != Selection::Kind::kBase && takes_fused_kernels(FusedOp::kLora, args.x)) {
    const cpu::TokenReading reading = cpu::read_tokens(args.x, {.weight = args.lora_a}, args.rows, selection);
    result.gate = reading.gate;
    result.hidden = reading.hidden.to(args.x.scalar_type());
    result.output = cpu::expand(args.base, reading.hidden, {.weight = args.lora_b, .scaling = args.scaling},
                                result.gate, selection);
    return result;
  }
  result.output = at::clone(args.base, at::MemoryFormat::Contiguous);
  if (selection.kind == Selection::Kind::kBase) {
    return result;
  }
  result.gate = gate_forward(args.x, args.rows, selection);
  result.hidden = project(args.x, select(selection, args.lora_a));
  // The coefficient goes to the narrow side: r columns instead of O.
  const auto type = args.x.scalar_type();
  const at::Tensor scaled = (result.hidden * lora_coefficient(args.scaling, selection, result.gate, type)).to(type);
  add_projection_(result.output, scaled, select(selection, args.lora_b));
  return result;
}

namespace {

std::tuple<at::Tensor, at::Tensor> lora_forward(const LoraArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.lora_a, /*recording=*/false);
  const LoraForward result = lora_forward(args, selection);
  return {result.output, gate_result(result.gate, args.x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("gated_lora", from_schema<LoraArguments, lora_forward, decltype(gated_lora)>);
}

}  // namespace
}  // namespace torchgraft::ops
