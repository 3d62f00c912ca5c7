#include <ATen/core/dispatch/Dispatcher.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/linear.h>
#include <torchgraft/ops/reft.h>
#include <torchgraft/ops/residual_norm.h>

// The operators as C++ functions: each call goes through the dispatcher.

namespace torchgraft::ops {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> gated_lora(const at::Tensor& x, const at::Tensor& base, const at::Tensor& lora_a,
                                              const at::Tensor& lora_b, const at::Tensor& scaling,
                                              const std::optional<at::Tensor>& gate_weight,
                                              const std::optional<at::Tensor>& gate_bias,
                                              const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
                                              const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(gated_lora)>("torchgraft::gated_lora");
  return op.call(x, base, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

std::tuple<at::Tensor, at::Tensor> gated_lora_linear(const at::Tensor& x, const at::Tensor& weight,
                                                     const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
                                                     const at::Tensor& lora_b, const at::Tensor& scaling,
                                                     const std::optional<at::Tensor>& gate_weight,
                                                     const std::optional<at::Tensor>& gate_bias,
                                                     const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
                                                     const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(gated_lora_linear)>("torchgraft::gated_lora_linear");
  return op.call(x, weight, bias, lora_a, lora_b, scaling, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

std::tuple<at::Tensor, at::Tensor> gated_bottleneck(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(gated_bottleneck)>("torchgraft::gated_bottleneck");
  return op.call(x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity, gate_weight,
                 gate_bias, adapter_ids, adapter, token_mask);
}

std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity, const std::optional<at::Tensor>& gate_weight,
    const std::optional<at::Tensor>& gate_bias, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
    const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(gated_bottleneck_linear)>("torchgraft::gated_bottleneck_linear");
  return op.call(x, input, weight, bias, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity,
                 gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

std::tuple<at::Tensor, at::Tensor> gated_prefix_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal, std::optional<double> scale,
    bool enable_gqa, const std::optional<at::Tensor>& gate_weight, const std::optional<at::Tensor>& gate_bias,
    const std::optional<at::Tensor>& adapter_ids, int64_t adapter, const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(gated_prefix_attention)>("torchgraft::gated_prefix_attention");
  return op.call(query, key, value, x, prefix_key, prefix_value, prefix_length, attn_mask, dropout_p, is_causal, scale,
                 enable_gqa, gate_weight, gate_bias, adapter_ids, adapter, token_mask);
}

at::Tensor reft(const at::Tensor& x, const at::Tensor& source_weight, const at::Tensor& source_bias,
                const at::Tensor& projection, const at::Tensor& subtraction, const at::Tensor& positions,
                std::string_view non_linearity, const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
                const std::optional<at::Tensor>& token_mask) {
  static const auto op = find<decltype(reft)>("torchgraft::reft");
  return op.call(x, source_weight, source_bias, projection, subtraction, positions, non_linearity, adapter_ids, adapter,
                 token_mask);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  std::string_view non_linearity) {
  static const auto op = find<decltype(linear)>("torchgraft::linear");
  return op.call(x, weight, bias, non_linearity);
}

std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& residual,
                                                 c10::SymIntArrayRef normalized_shape,
                                                 const std::optional<at::Tensor>& weight,
                                                 const std::optional<at::Tensor>& bias, double eps) {
  static const auto op = find<decltype(residual_norm)>("torchgraft::residual_norm");
  return op.call(x, residual, normalized_shape, weight, bias, eps);
}

at::Tensor attention_token_mask(const at::Tensor& x, const std::optional<at::Tensor>& attn_mask) {
  static const auto op = find<decltype(attention_token_mask)>("torchgraft::attention_token_mask");
  return op.call(x, attn_mask);
}

}  // namespace torchgraft::ops
