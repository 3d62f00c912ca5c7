#include <ATen/core/dispatch/Dispatcher.h>
#include <torchgraft/ops/gated_prefix_attention.h>

namespace torchgraft::ops {

std::tuple<at::Tensor, at::Tensor> gated_prefix_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torchgraft::gated_prefix_attention", "")
                             .typed<decltype(gated_prefix_attention)>();
  return op.call(query, key, value, x, prefix_key, prefix_value, prefix_length, attn_mask, dropout_p, is_causal, scale,
                 enable_gqa, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

}  // namespace torchgraft::ops
