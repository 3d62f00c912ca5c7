#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/forward/gated_bottleneck.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {
namespace {

// A scaling for each channel would have to be multiplied into the up weight first.
bool takes_fused_kernel(const BottleneckLinearArguments& args) {
  return takes_fused_kernels(FusedOp::kBottleneckLinear, args.x) && has_memory(args.input) &&
         cpu::is_read_in_place(args.weight, args.x.size(1)) && args.scaling.size(1) == 1;
}

std::tuple<at::Tensor, Gate> fused_forward(const BottleneckLinearArguments& args, const Selection& selection) {
  if (selection.kind == Selection::Kind::kBase) {
    return {cpu::linear_with_update(args.input, args.weight, args.bias, {}, selection), {}};
  }
  const NarrowSide narrow = fused_narrow_side(args, selection, /*keep_inner=*/false);
  const cpu::ProjectionUpdate update{.hidden = narrow.hidden,
                                     .weight = args.up_weight,
                                     .bias = args.up_bias,
                                     .scaling = args.scaling,
                                     .gate = narrow.gate};
  return {cpu::linear_with_update(args.input, args.weight, args.bias, update, selection), narrow.gate};
}

std::tuple<at::Tensor, at::Tensor> bottleneck_linear_forward(const BottleneckLinearArguments& args) {
  check(args);
  const Selection selection = resolve_selection(args.kOperator, args.rows, args.down_weight, /*recording=*/false);
  if (takes_fused_kernel(args)) {
    const auto [output, gate] = fused_forward(args, selection);
    return {output, gate_result(gate, args.x, args.rows, selection)};
  }
  const at::Tensor residual = linear_map(args.input, args.weight, args.bias);
  const BottleneckForward result = bottleneck_forward(args.bottleneck(residual), selection, /*keep_inner=*/false);
  return {result.output, gate_result(result.gate, args.x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("gated_bottleneck_linear",
         from_schema<BottleneckLinearArguments, bottleneck_linear_forward, decltype(gated_bottleneck_linear)>);
}

}  // namespace
}  // namespace torchgraft::ops
