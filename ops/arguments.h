#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace torchgraft::ops {

// The arguments of each op as one value, so that checks, kernels and gradients share one spelling of them.
// Dimensions: N adapters in the bank, B batch rows, S tokens, I input and O output features, H hidden size, R
// bottleneck size, r rank, G gates, h heads, h_kv key/value heads, S_k keys, P prefix positions, d head size. An
// optional tensor that is absent is an undefined tensor.

inline at::Tensor or_undefined(const std::optional<at::Tensor>& tensor) { return tensor.value_or(at::Tensor()); }

// What every op takes: the gate and which adapter each row uses.
struct RowArguments {
  at::Tensor gate_weight;  // [N, G, I]; absent: no gate
  at::Tensor gate_bias;    // [N, G]
  at::Tensor adapter_ids;  // int64 [B]; absent: `adapter` for every row
  int64_t adapter = 0;     // -1: the base model
  at::Tensor token_mask;   // bool [B, S], true = real token; absent: all real
};

inline RowArguments row_arguments(const std::optional<at::Tensor>& gate_weight,
                                  const std::optional<at::Tensor>& gate_bias,
                                  const std::optional<at::Tensor>& adapter_ids, int64_t adapter,
                                  const std::optional<at::Tensor>& token_mask) {
  return {or_undefined(gate_weight), or_undefined(gate_bias), or_undefined(adapter_ids), adapter,
          or_undefined(token_mask)};
}

struct LoraArguments {
  at::Tensor x;        // [B, S, I]
  at::Tensor base;     // [B, S, O]
  at::Tensor lora_a;   // [N, r, I]
  at::Tensor lora_b;   // [N, O, r]
  at::Tensor scaling;  // [N]
  RowArguments rows;
};

struct BottleneckArguments {
  at::Tensor x;            // [B, S, H]
  at::Tensor residual;     // [B, S, H]
  at::Tensor down_weight;  // [N, R, H]
  at::Tensor down_bias;    // [N, R]
  at::Tensor up_weight;    // [N, H, R]
  at::Tensor up_bias;      // [N, H]
  at::Tensor scaling;      // [N, 1] or [N, H]
  std::string non_linearity;
  RowArguments rows;
};

// In the order of the schemas; gated_bottleneck_linear has no residual (undefined).
inline BottleneckArguments bottleneck_arguments(const at::Tensor& x, const at::Tensor& residual,
                                                const at::Tensor& down_weight, const at::Tensor& down_bias,
                                                const at::Tensor& up_weight, const at::Tensor& up_bias,
                                                const at::Tensor& scaling, std::string_view non_linearity,
                                                RowArguments rows) {
  return {
      x, residual, down_weight, down_bias, up_weight, up_bias, scaling, std::string(non_linearity), std::move(rows)};
}

struct PrefixArguments {
  at::Tensor query;          // [B, h, S, d]
  at::Tensor key;            // [B, h_kv, S_k, d]
  at::Tensor value;          // [B, h_kv, S_k, d]
  at::Tensor x;              // [B, S, H]
  at::Tensor prefix_key;     // [N, h_kv, P, d]
  at::Tensor prefix_value;   // [N, h_kv, P, d]
  at::Tensor prefix_length;  // int64 [N]
  at::Tensor attn_mask;      // bool or floating, broadcastable to [B, h, S, S_k]; absent: no mask
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale;  // absent: 1 / sqrt(d)
  bool enable_gqa = false;
  RowArguments rows;
};

}  // namespace torchgraft::ops
