#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft::ops {

// The arguments of each operator as one struct, which checks, forward passes and gradients take. Members stand in the
// order of the schema (registration/schemas.cpp): from_schema.h fills them in that order. An optional tensor that is
// absent is an undefined tensor here.
// Dimensions: N adapters in the bank, B batch rows, S tokens, I input and O output features, H hidden size, R
// bottleneck size, r rank, G gates, h heads, h_kv key/value heads, S_k keys, P prefix positions, d head size.

struct GateParameters {
  at::Tensor weight;  // gate_weight [N, G, I]; absent: no gate
  at::Tensor bias;    // gate_bias [N, G]
};

// The last arguments of every schema: the gate, and the adapter of each row.
struct RowArguments {
  GateParameters gate;
  at::Tensor adapter_ids;  // int64 [B]; absent: `adapter` for every row
  int64_t adapter = 0;     // -1: the base model
  at::Tensor token_mask;   // bool [B, S], true = real token; absent: all real
};

struct LoraArguments {
  static constexpr const char* kOperator = "gated_lora";
  at::Tensor x;        // [B, S, I]
  at::Tensor base;     // [B, S, O]
  at::Tensor lora_a;   // [N, r, I]
  at::Tensor lora_b;   // [N, O, r]
  at::Tensor scaling;  // [N]
  RowArguments rows;
};

struct LoraLinearArguments {
  static constexpr const char* kOperator = "gated_lora_linear";
  at::Tensor x;        // [B, S, I]
  at::Tensor weight;   // [O, I]
  at::Tensor bias;     // [O] or absent
  at::Tensor lora_a;   // [N, r, I]
  at::Tensor lora_b;   // [N, O, r]
  at::Tensor scaling;  // [N]
  RowArguments rows;

  // The LoRA alone, on what the projection gave.
  LoraArguments lora(const at::Tensor& base) const { return {x, base, lora_a, lora_b, scaling, rows}; }
};

struct BottleneckArguments {
  static constexpr const char* kOperator = "gated_bottleneck";
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

struct BottleneckLinearArguments {
  static constexpr const char* kOperator = "gated_bottleneck_linear";
  at::Tensor x;            // [B, S, H]
  at::Tensor input;        // [B, S, I]
  at::Tensor weight;       // [H, I]
  at::Tensor bias;         // [H] or absent
  at::Tensor down_weight;  // [N, R, H]
  at::Tensor down_bias;    // [N, R]
  at::Tensor up_weight;    // [N, H, R]
  at::Tensor up_bias;      // [N, H]
  at::Tensor scaling;      // [N, 1] or [N, H]
  std::string non_linearity;
  RowArguments rows;

  // The bottleneck alone, added to what the linear map gave.
  BottleneckArguments bottleneck(const at::Tensor& residual) const {
    return {x, residual, down_weight, down_bias, up_weight, up_bias, scaling, non_linearity, rows};
  }
};

struct PrefixArguments {
  static constexpr const char* kOperator = "gated_prefix_attention";
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

struct ReftArguments {
  static constexpr const char* kOperator = "reft";
  at::Tensor x;              // [B, S, H]
  at::Tensor source_weight;  // [N, U, r, H], U units: one for all positions, or one for the first and one for the last
  at::Tensor source_bias;    // [N, U, r]
  at::Tensor projection;     // [N, U, r, H]
  at::Tensor subtraction;    // [N]
  at::Tensor positions;      // int64 [N, 2]: how many at the beginning of a row, and at its end
  std::string non_linearity;
  at::Tensor adapter_ids;  // as in RowArguments
  int64_t adapter = 0;
  at::Tensor token_mask;

  RowArguments rows() const { return {{}, adapter_ids, adapter, token_mask}; }
  const at::Tensor& real_tokens() const { return token_mask; }
};

struct LinearArguments {
  static constexpr const char* kOperator = "linear";
  at::Tensor x;       // [..., I]
  at::Tensor weight;  // [O, I]
  at::Tensor bias;    // [O] or absent
  std::string non_linearity;
};

struct ResidualNormArguments {
  static constexpr const char* kOperator = "residual_norm";
  at::Tensor x;  // broadcasts against residual
  at::Tensor residual;
  std::vector<c10::SymInt> normalized_shape;  // the last dimensions of the sum
  at::Tensor weight;                          // of normalized_shape, or absent
  at::Tensor bias;                            // likewise
  double eps = 1e-5;
};

struct TokenMaskArguments {
  static constexpr const char* kOperator = "attention_token_mask";
  at::Tensor x;          // [B, S, H]
  at::Tensor attn_mask;  // bool or floating, broadcastable to [B, h, S_q, S]; absent: all tokens are real
};

}  // namespace torchgraft::ops
