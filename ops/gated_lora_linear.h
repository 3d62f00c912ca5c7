#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace torchgraft::ops {

// A linear map with its gated LoRA, which reads x once:
//   gated_lora(x, x weight^T + bias, lora_a, lora_b, scaling, ...)
//
// weight [O, I], bias [O] or absent; all else, the results and the errors as in ops/gated_lora.h. The fused CPU kernel
// (float32, ops/cpu/projection.h) sums the update where the projection is summed; elsewhere, and where gradients are
// recorded, it is the two calls that the formula says.
TORCHGRAFT_API std::tuple<at::Tensor, at::Tensor> gated_lora_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const at::Tensor& scaling, const std::optional<at::Tensor>& gate_weight = std::nullopt,
    const std::optional<at::Tensor>& gate_bias = std::nullopt,
    const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
    const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace torchgraft::ops
