#include <torch/library.h>
#include <torchgraft/ops/autocast/support.h>
#include <torchgraft/ops/gated_bottleneck_linear.h>

namespace torchgraft::ops {
namespace {

template <c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear_autocast(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  const Autocast<device> cast;
  return gated_bottleneck_linear(cast(x), cast(input), cast(weight), cast(bias), cast(down_weight), cast(down_bias),
                                 cast(up_weight), cast(up_bias), cast(scaling), non_linearity, cast(gate_weight),
                                 cast(gate_bias), adapter_ids, adapter, token_mask);
}

TORCH_LIBRARY_IMPL(torchgraft, AutocastCPU, m) {
  m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_autocast<at::kCPU>));
}
TORCH_LIBRARY_IMPL(torchgraft, AutocastCUDA, m) {
  m.impl("gated_bottleneck_linear", TORCH_FN(gated_bottleneck_linear_autocast<at::kCUDA>));
}

}  // namespace
}  // namespace torchgraft::ops
