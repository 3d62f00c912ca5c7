#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/ops/check.h>

namespace torchgraft::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_meta(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  check(bottleneck_arguments(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                             row_arguments(gate_weight, gate_bias, adapter_ids, adapter, token_mask)));
  return {at::empty_symint(residual.sym_sizes(), residual.options()),
          at::empty_symint({x.sym_size(0), 1}, x.options())};
}

TORCH_LIBRARY_IMPL(torchgraft, Meta, m) { m.impl("gated_bottleneck", TORCH_FN(gated_bottleneck_meta)); }

}  // namespace
}  // namespace torchgraft::ops
