#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace torchgraft::ops {

// Attention over gated prefixes (prefix tuning, Li and Liang 2021; gates: UniPELT, Mao et al. 2022) and the sequence:
//   output[b] = softmax(scale query[b] [g_k[b] prefix_key[n]; key[b]]^T + [0; mask]) [g_v[b] prefix_value[n]; value[b]]
//   g[b]      = mean over tokens of sigmoid(x[b] gate_weight[n]^T + gate_bias[n]),  1 without gate_weight
// with n = adapter_ids[b], or `adapter` for every row. n = -1: plain attention, gate 0. Column 0 of g gates the keys,
// its last column the values. Every query sees the prefix, under any mask and under is_causal. Prefix and sequence are
// never concatenated: both are attended to and merged by their log-sum-exps.
//
// query [B, h, S, d], key and value [B, h_kv, S_k, d], x [B, S, H] (the hidden states that enter the attention),
// prefix_key and prefix_value [N, h_kv, P, d], gate_weight [N, G, H], gate_bias [N, G] with G in {1, 2}, all in one of
// float32, float64, bfloat16, float16 and on one device; prefix_length int64 [N]: adapter n uses its first
// prefix_length[n] prefix positions; attn_mask, dropout_p, is_causal, scale and enable_gqa as in
// torch.nn.functional.scaled_dot_product_attention (is_causal is aligned to the top left; not both a mask and
// is_causal; dropout acts on the prefix's probabilities too); adapter_ids int64 [B]; token_mask bool [B, S], true where
// a token counts for the gate (absent: all). A query that sees nothing at all yields 0. Returns output [B, h, S, d], in
// memory [B, S, h, d], and gate [B, G], both in x's dtype. Differentiable once in every floating argument, a floating
// attn_mask included. Throws c10::Error on wrong shapes, dtypes, devices and ids (on CUDA ids are checked
// asynchronously).
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_prefix_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& x,
    const at::Tensor& prefix_key, const at::Tensor& prefix_value, const at::Tensor& prefix_length,
    const std::optional<at::Tensor>& attn_mask = std::nullopt, double dropout_p = 0.0, bool is_causal = false,
    std::optional<double> scale = std::nullopt, bool enable_gqa = false,
    const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace torchgraft::ops
