#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace torchgraft::ops {

// Bottleneck adapter (Houlsby et al. 2019; scaled and parallel: He et al. 2021) with UniPELT's per-row gate:
//   output[b] = residual[b] + scaling[n] g[b] (f(x[b] down_weight[n]^T + down_bias[n]) up_weight[n]^T + up_bias[n])
//   g[b]      = mean over tokens of sigmoid(x[b] gate_weight[n]^T + gate_bias[n]),  1 without gate_weight
// with n = adapter_ids[b], or `adapter` for every row. n = -1: output[b] = residual[b], gate 0.
//
// x, residual [B, S, H], down_weight [N, R, H], down_bias [N, R], up_weight [N, H, R], up_bias [N, H], scaling [N, 1]
// or [N, H], gate_weight [N, 1, H], gate_bias [N, 1], all in one of float32, float64, bfloat16, float16 and on one
// device; non_linearity: f, one of non_linearity_names(); adapter_ids int64 [B]; token_mask bool [B, S], true where a
// token counts for the gate (absent: all). A row without such a token has gate 0. Returns output [B, S, H] (contiguous)
// and gate [B, 1], both in x's dtype. Differentiable once in every floating argument. Throws c10::Error on wrong
// shapes, dtypes, devices, names and ids (on CUDA ids are checked asynchronously).
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_bottleneck(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& down_weight, const at::Tensor& down_bias,
    const at::Tensor& up_weight, const at::Tensor& up_bias, const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

// A linear map and the parallel bottleneck that is added to its result (He et al. 2021: beside a feed-forward block):
//   gated_bottleneck(x, residual = input weight^T + bias, down_weight, ...)
//
// input [B, S, I], weight [H, I], bias [H] or absent; all else, the results and the errors as in
// gated_bottleneck. The fused CPU kernel (float32 and bfloat16, ops/cpu/projection.h) sums the up projection
// where the linear map is summed; elsewhere, with a scaling for each channel, and where gradients are recorded, it is
// the two calls that the formula says.
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_bottleneck_linear(
    const at::Tensor& x, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& scaling, std::string_view non_linearity,
    const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace torchgraft::ops
