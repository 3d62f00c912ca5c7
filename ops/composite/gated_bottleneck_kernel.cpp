#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_bottleneck_kernel.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

NarrowSide fused_narrow_side(const BottleneckArguments& args, const Selection& selection, bool keep_inner) {
  const Activation& activation = find_activation(args.non_linearity);
  const std::optional<cpu::FusedActivation> fused = cpu::fused_activation(activation.name);
  const bool apart = !fused.has_value();
  const cpu::TokenReading reading = cpu::read_tokens(
      args.x, {args.down_weight, args.down_bias, fused.value_or(cpu::FusedActivation::kIdentity), keep_inner && !apart},
      args.rows, selection);
  if (apart) {
    return {reading.gate, reading.hidden, activation.forward(reading.hidden).contiguous()};
  }
  return {reading.gate, reading.inner, reading.hidden};
}

namespace {

BottleneckForward fused_forward(const BottleneckArguments& args, const Selection& selection, bool keep_inner) {
  const NarrowSide narrow = fused_narrow_side(args, selection, keep_inner);
  BottleneckForward result;
  result.gate = narrow.gate;
  result.output =
      cpu::expand(args.residual, narrow.hidden, {args.up_weight, args.up_bias, args.scaling}, result.gate, selection);
  const auto type = args.x.scalar_type();
  result.inner = narrow.inner.defined() ? narrow.inner.to(type) : narrow.inner;
  result.hidden = narrow.hidden.to(type);
  return result;
}

}  // namespace

BottleneckForward bottleneck_forward(const BottleneckArguments& args, const Selection& selection, bool keep_inner) {
  if (selection.kind != Selection::Kind::kBase && takes_fused_kernels(FusedOp::kBottleneck, args.x)) {
    return fused_forward(args, selection, keep_inner);
  }
  BottleneckForward result;
  if (selection.kind == Selection::Kind::kBase) {
    result.output = at::clone(args.residual, at::MemoryFormat::Contiguous);
    return result;
  }
  const auto type = args.x.scalar_type();
  result.gate = gate_forward(args.x, args.rows, selection);
  const at::Tensor down_bias = select(selection, args.down_bias).unsqueeze(-2);  // [(B,) 1, R]
  result.inner = project(args.x, select(selection, args.down_weight)).add_(down_bias);
  result.hidden = find_activation(args.non_linearity).forward(result.inner);

  // scaling (f U^T + b) g = (g f) (scaling U)^T + g (scaling b): nothing wide is computed twice. One scaling for all
  // channels goes to the narrow side instead of the weight.
  at::Tensor scaling = select(selection, args.scaling);  // [(B,) 1] or [(B,) H]
  at::Tensor up_weight = select(selection, args.up_weight);
  at::Tensor bias = (scaling * select(selection, args.up_bias)).unsqueeze(-2);  // [(B,) 1, H]
  at::Tensor coefficient;                                                       // [(B,) 1, 1]
  if (TORCH_GUARD_OR_FALSE(args.scaling.sym_size(1).sym_eq(1))) {
    coefficient = scaling.unsqueeze(-1);
  } else {
    up_weight = up_weight * scaling.unsqueeze(-1);
  }
  if (result.gate.value.defined()) {
    const at::Tensor gate = result.gate.value.unsqueeze(-1);  // [B, 1, 1]
    bias = (bias * gate).to(type);
    coefficient = coefficient.defined() ? coefficient * gate : gate;
  }
  const at::Tensor scaled = coefficient.defined() ? (result.hidden * coefficient).to(type) : result.hidden;
  result.output = at::add(args.residual.contiguous(), bias);
  add_projection_(result.output, scaled, up_weight);
  return result;
}

namespace {

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_composite(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  const BottleneckArguments args =
      bottleneck_arguments(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                           row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask));
  check(args);
  const Selection selection = resolve_selection("gated_bottleneck", args.rows, down_weight, /*recording=*/false);
  const BottleneckForward forward = bottleneck_forward(args, selection, /*keep_inner=*/false);
  return {forward.output, gate_result(forward.gate, x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) { m.impl("gated_bottleneck", TORCH_FN(gated_bottleneck_composite)); }
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) { m.impl("gated_bottleneck", TORCH_FN(gated_bottleneck_composite)); }

}  // namespace
}  // namespace torchgraft::ops
