#include <torch/library.h>
#include <torchgraft/ops/autocast/support.h>
#include <torchgraft/ops/gated_prefix_attention.h>

namespace torchgraft::ops {
namespace {

template <c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor> gated_prefix_attention_autocast(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  const Autocast<device> cast;
  return gated_prefix_attention(cast(query), cast(key), cast(value), cast(x), cast(prefix_key), cast(prefix_value),
                                prefix_length, cast(attn_mask), dropout_p, is_causal, scale, enable_gqa,
                                cast(gate_weight), cast(gate_bias), adapter_ids, adapter, token_mask);
}

TORCH_LIBRARY_IMPL(torchgraft, AutocastCPU, m) {
  m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_autocast<at::kCPU>));
}
TORCH_LIBRARY_IMPL(torchgraft, AutocastCUDA, m) {
  m.impl("gated_prefix_attention", TORCH_FN(gated_prefix_attention_autocast<at::kCUDA>));
}

}  // namespace
}  // namespace torchgraft::ops
