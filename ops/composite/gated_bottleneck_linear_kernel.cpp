#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/composite/gated_bottleneck_kernel.h>
#include <torchgraft/ops/cpu/projection.h>
#include <torchgraft/ops/kernel_choice.h>

namespace torchgraft::ops {
namespace {

// A scaling for each channel would have to be multiplied into the up weight first.
bool takes_fused_kernel(const BottleneckArguments& args, const at::Tensor& input, const at::Tensor& weight) {
  return takes_fused_kernels(FusedOp::kBottleneckLinear, args.x) && has_memory(input) &&
         cpu::is_read_in_place(weight, args.x.size(1)) && args.scaling.size(1) == 1;
}

std::tuple<at::Tensor, Gate> fused_forward(const BottleneckArguments& args, const at::Tensor& input,
                                           const at::Tensor& weight, const at::Tensor& bias,
                                           const Selection& selection) {
  if (selection.kind == Selection::Kind::kBase) {
    return {cpu::linear_with_update(input, weight, bias, {}, selection), {}};
  }
  const NarrowSide narrow = fused_narrow_side(args, selection, /*keep_inner=*/false);
  const cpu::ProjectionUpdate update{narrow.hidden, args.up_weight, args.up_bias, args.scaling, narrow.gate};
  return {cpu::linear_with_update(input, weight, bias, update, selection), narrow.gate};
}

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear_composite(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  BottleneckArguments args =
      bottleneck_arguments(x, {}, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                           row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask));
  check(args, input, weight, or_undefined(bias));
  const Selection selection = resolve_selection("gated_bottleneck_linear", args.rows, down_weight, /*recording=*/false);
  if (takes_fused_kernel(args, input, weight)) {
    const auto [output, gate] = fused_forward(args, input, weight, or_undefined(bias), selection);
    return {output, gate_result(gate, x, args.rows, selection)};
  }
  args.residual = at::linear(input, weight, bias);
  const BottleneckForward forward = bottleneck_forward(args, selection, /*keep_inner=*/false);
  return {forward.output, gate_result(forward.gate, x, args.rows, selection)};
}

TORCH_LIBRARY_IMPL(torchgraft, CPU, m) {
  m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_composite));
}
TORCH_LIBRARY_IMPL(torchgraft, CUDA, m) {
  m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_composite));
}

}  // namespace
}  // namespace torchgraft::ops
