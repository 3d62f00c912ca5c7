#pragma once

#include <torchgraft/ops/attention.h>

namespace torchgraft::ops::cpu {

// Gradients of attend(), by row of the batch.
struct AttentionGradients {
  at::Tensor query;         // [B, h, S, d], as_token_major like key and value: what the projections' gradients read
  at::Tensor key;           // [B, h_kv, S_k, d]; undefined: not asked for
  at::Tensor value;         // [B, h_kv, S_k, d]; undefined: not asked for
  at::Tensor prefix_key;    // [B, h_kv, P, d], of the gated prefixes
  at::Tensor prefix_value;  // [B, h_kv, P, d], of the gated prefixes
};

// forward: what attend() gave, with a precise log_sum_exp. grad [B, h, S, d]. float32; nothing of size [S, S_k] is
// formed. The same bits for any number of threads.
AttentionGradients attend_backward(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& mask,
                                   const AttentionForward& forward, const at::Tensor& grad, bool need_key,
                                   bool need_value);

}  // namespace torchgraft::ops::cpu
