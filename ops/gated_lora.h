#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace torchgraft::ops {

// LoRA (Hu et al. 2021) with the per-row gate of UniPELT (Mao et al. 2022):
//   output[b] = base[b] + scaling[n] g[b] (x[b] lora_a[n]^T) lora_b[n]^T
//   g[b]      = mean over tokens of sigmoid(x[b] gate_weight[n]^T + gate_bias[n]),  1 without gate_weight
// with n = adapter_ids[b], or `adapter` for every row. n = -1: output[b] = base[b], gate 0.
//
// x [B, S, I], base [B, S, O] (what the projection without LoRA gave), lora_a [N, r, I], lora_b [N, O, r], scaling [N]
// (alpha / r; 1 where the adapter is gated, as the gate replaces it in the adapters library), gate_weight [N, 1, I],
// gate_bias [N, 1], all in one of float32, float64, bfloat16, float16 and on one device; adapter_ids int64 [B];
// token_mask bool [B, S], true where a token counts for the gate (absent: all). A row without such a token has gate 0.
// Returns output [B, S, O] (contiguous) and gate [B, 1], both in x's dtype. Differentiable once in every floating
// argument. Throws c10::Error on wrong shapes, dtypes, devices and ids (on CUDA ids are checked asynchronously).
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_lora(
    const at::Tensor& x, const at::Tensor& base, const at::Tensor& lora_a, const at::Tensor& lora_b,
    const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

// A linear map with its gated LoRA, which reads x once:
//   gated_lora(x, x weight^T + bias, lora_a, lora_b, scaling, ...)
//
// weight [O, I], bias [O] or absent; all else, the results and the errors as in gated_lora. The fused CPU kernel
// (float32, ops/cpu/projection.h) sums the update where the projection is summed; elsewhere, and where gradients are
// recorded, it is the two calls that the formula says.
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_lora_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace torchgraft::ops
