#pragma once

#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops::cpu {

// What is added to a linear map of the same result: c (hidden weight^T + bias), where c of a row is its scaling
// times its gate.
struct ProjectionUpdate {
  at::Tensor hidden{};   // [B, S, R] float32, contiguous; undefined: nothing is added
  at::Tensor weight{};   // bank [N, O, R]
  at::Tensor bias{};     // bank [N, O]; may be undefined
  at::Tensor scaling{};  // [N] or [N, 1]
  Gate gate{};
};

// Whether linear_with_update reads `weight` [O, I] without a copy, for rows of `row_tokens` tokens. It does if the
// weight is contiguous, or if it is the transpose of a contiguous float32 weight (Conv1D's; a linear map's in its
// gradient), there are enough tokens and no more than 1024 features on either side: elsewhere a copy is faster.
bool is_read_in_place(const at::Tensor& weight, int64_t row_tokens);

// x weight^T + bias and `update` in one pass: the update is summed in the registers that hold the projection.
// x [B, S, I], weight [O, I], bias [O] or undefined, and the banks, all float32 or all bfloat16 -> [B, S, O]. For a
// base selection the update is not read.
at::Tensor linear_with_update(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const ProjectionUpdate& update, const Selection& selection);

// activation(x weight^T + bias), all as above.
at::Tensor activated_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            FusedActivation activation);

}  // namespace torchgraft::ops::cpu
