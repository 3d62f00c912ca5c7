#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear_meta(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  const BottleneckArguments args =
      bottleneck_arguments(x, {}, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                           row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask));
  check(args, input, weight, or_undefined(bias));
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint({x.sym_size(0), 1}, x.options())};
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) { m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_meta)); }

}  // namespace
}  // namespace torchgraft::ops
