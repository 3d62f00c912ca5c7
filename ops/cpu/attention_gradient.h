#pragma once

#include <cstdint>

namespace torchgraft::ops::cpu {

// Gradients of softmax(scale q [key_gate prefix_key, k]^T + mask) [value_gate prefix_value, v], for one head of
// queries. Rows lie head_size apart or more, elements of a row are neighbours. Gradients of keys, values and prefixes
// are added to what is there: heads that share keys (grouped queries) run one after the other.
struct HeadAttentionGradient {
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t head_size = 0;
  int64_t prefix = 0;
  const float* q = nullptr;
  int64_t q_stride = 0;
  const float* k = nullptr;
  int64_t k_stride = 0;
  const float* v = nullptr;
  int64_t v_stride = 0;
  const float* prefix_key = nullptr;    // [prefix, head_size], already gated
  const float* prefix_value = nullptr;  // [prefix, head_size], already gated
  float scale = 1.0F;
  const float* mask = nullptr;  // added to the scores; may be null
  int64_t mask_row_stride = 0;  // from query to query
  int64_t mask_column_stride = 0;
  bool is_causal = false;         // query i sees keys 0 to i, beside the prefix
  const float* output = nullptr;  // [queries, head_size], of the forward pass
  int64_t output_stride = 0;
  const float* log_sum_exp = nullptr;  // [queries]; precise (see is_precise in ops/attention.h)
  int64_t log_sum_exp_stride = 0;
  const float* grad = nullptr;  // [queries, head_size], of the output
  int64_t grad_stride = 0;

  float* grad_q = nullptr;  // [queries, head_size], overwritten
  int64_t grad_q_stride = 0;
  float* grad_k = nullptr;  // [keys, head_size]; null: not asked for
  int64_t grad_k_stride = 0;
  float* grad_v = nullptr;  // [keys, head_size]; null: not asked for
  int64_t grad_v_stride = 0;
  float* grad_prefix_key = nullptr;    // [prefix, head_size], of the gated keys
  float* grad_prefix_value = nullptr;  // [prefix, head_size], of the gated values
  float* workspace = nullptr;          // attention_gradient_workspace(...) elements
};

}  // namespace torchgraft::ops::cpu
