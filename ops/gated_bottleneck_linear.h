#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace torchgraft::ops {

// A linear map and the parallel bottleneck that is added to its result (He et al. 2021: beside a feed-forward block):
//   gated_bottleneck(x, residual = input weight^T + bias, down_weight, ...)
//
// input [B, S, I], weight [H, I], bias [H] or absent; all else, the results and the errors as in
// ops/gated_bottleneck.h. The fused CPU kernel (float32 and bfloat16, ops/cpu/projection.h) sums the up projection
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
