#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace torchgraft::ops {

// Representation fine-tuning (Wu et al. 2024): changes a few tokens of x, and copies all others.
//   output[b, t] = x[b, t] + (non_linearity(x[b, t] W^T + w) - s[n] x[b, t] P^T) P
// with n = adapter_ids[b], or `adapter` for every row, at the first positions[n, 0] real tokens of row b by unit 0 of
// the parameters, at its last positions[n, 1] ones by the last unit, which overrules the first. W, w and P are a unit
// of source_weight[n], source_bias[n] and projection[n]; s = subtraction, 1 or 0. n = -1: output[b] = x[b].
//
// The real tokens of a row begin at the first true in its token_mask, and there are as many as there are trues: a mask
// with gaps counts as one without. Absent: all tokens are real. Positions outside of the row's S tokens are left out,
// all others are taken, real or not.
//
// x [B, S, H], source_weight and projection [N, U, r, H], source_bias [N, U, r] with U in {1, 2}, subtraction [N], all
// in one of float32, float64, bfloat16, float16 and on one device; positions int64 [N, 2]; non_linearity: a name of
// non_linearity_names() ("linear": none); adapter_ids int64 [B]; token_mask bool [B, S]. Returns [B, S, H] (contiguous)
// in x's dtype. On the CPU only the changed tokens are read. The gradients are those of ATen's calls. Throws c10::Error
// on wrong shapes, dtypes, devices and ids (on CUDA ids are checked asynchronously); also, on the CPU, where an adapter
// has both kinds of positions and more of the last ones than there are tokens: the adapters library then mixes them up.
TORCHGRAFT_API at::Tensor reft(const at::Tensor& x, const at::Tensor& source_weight, const at::Tensor& source_bias,
                               const at::Tensor& projection, const at::Tensor& subtraction, const at::Tensor& positions,
                               std::string_view non_linearity = "linear",
                               const std::optional<at::Tensor>& adapter_ids = std::nullopt, int64_t adapter = 0,
                               const std::optional<at::Tensor>& token_mask = std::nullopt);

}  // namespace torchgraft::ops
