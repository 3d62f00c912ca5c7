#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/forward/gated_lora_linear.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {
namespace {

LoraForward fused_forward(const LoraLinearArguments& args, const Selection& selection) {
  if (selection.kind == Selection::Kind::kBase) {
    return {cpu::linear_with_update(args.x, args.weight, args.bias, {}, selection), {}, {}};
  }
  const at::Tensor x = args.x.contiguous();
  const cpu::TokenReading reading = cpu::read_tokens(x, {.weight = args.lora_a}, args.rows, selection);
  const cpu::ProjectionUpdate update{
      .hidden = reading.hidden, .weight = args.lora_b, .scaling = args.scaling, .gate = reading.gate};
  return {cpu::linear_with_update(x, args.weight, args.bias, update, selection), reading.gate,
          reading.hidden.to(x.scalar_type())};
}

}  // namespace

LoraForward lora_linear_forward(const LoraLinearArguments& args, const Selection& selection) {
  if (takes_fused_kernels(FusedOp::kLoraLinear, args.x) && cpu::is_read_in_place(args.weight, args.x.size(1))) {
    return fused_forward(args, selection);
  }
  return lora_forward(args.lora(linear_map(args.x, args.weight, args.bias)), selection);
}

namespace {

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(const LoraLinearArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.lora_a, /*recording=*/false);
  const LoraForward result = lora_linear_forward(args, selection);
  return {result.output, gate_result(result.gate, args.x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("gated_lora_linear", from_schema<LoraLinearArguments, lora_linear_forward, decltype(gated_lora_linear)>);
}

}  // namespace
}  // namespace torchgraft::ops
