#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/expand.h>
#include <torchgraft/ops/cpu/read_tokens.h>
#include <torchgraft/ops/forward/gated_bottleneck.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {

template <typename Arguments>
NarrowSide fused_narrow_side(const Arguments& args, const Selection& selection, bool keep_inner) {
  const Activation& activation = find_activation(args.non_linearity);
  const std::optional<cpu::FusedActivation> fused = cpu::fused_activation(activation.function);
  const bool apart = !fused.has_value();  // its input is then kept anyway
  const cpu::TokenReader reader{.weight = args.down_weight,
                                .bias = args.down_bias,
                                .activation = fused.value_or(cpu::FusedActivation::kIdentity),
                                .keep_inner = keep_inner && !apart};
  const cpu::TokenReading reading = cpu::read_tokens(args.x, reader, args.rows, selection);
  if (apart) {
    return {reading.gate, reading.hidden, activation.forward(reading.hidden).contiguous()};
  }
  return {reading.gate, reading.inner, reading.hidden};
}

template NarrowSide fused_narrow_side(const BottleneckArguments&, const Selection&, bool);
template NarrowSide fused_narrow_side(const BottleneckLinearArguments&, const Selection&, bool);

namespace {

BottleneckForward fused_forward(const BottleneckArguments& args, const Selection& selection, bool keep_inner) {
  const NarrowSide narrow = fused_narrow_side(args, selection, keep_inner);
  BottleneckForward result;
  result.gate = narrow.gate;
  const cpu::Expansion expansion{.weight = args.up_weight, .bias = args.up_bias, .scaling = args.scaling};
  result.output = cpu::expand(args.residual, narrow.hidden, expansion, result.gate, selection);
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

std::tuple<at::Tensor, at::Tensor> bottleneck_forward(const BottleneckArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.down_weight, /*recording=*/false);
  const BottleneckForward result = bottleneck_forward(args, selection, /*keep_inner=*/false);
  return {result.output, gate_result(result.gate, args.x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("gated_bottleneck", from_schema<BottleneckArguments, bottleneck_forward, decltype(gated_bottleneck)>);
}

}  // namespace
}  // namespace torchgraft::ops
