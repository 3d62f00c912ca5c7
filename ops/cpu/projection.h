#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/composite/gated_lora_kernel.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops::cpu {

// What is added to a linear map of the same result: c (hidden weight^T + bias), where c of a row is its adapter's
// scaling times its gate.
struct ProjectionUpdate {
  at::Tensor hidden;   // [B, S, R] float32, contiguous; undefined: nothing is added
  at::Tensor weight;   // bank [N, O, R]
  at::Tensor bias;     // bank [N, O]; may be undefined
  at::Tensor scaling;  // [N] or [N, 1]
  Gate gate;
};

// Whether linear_with_update reads `weight` [O, I] where it lies for rows of `row_tokens` tokens, uncopied: a
// contiguous one, and the transpose of one in float32 (Conv1D's; a linear map's in its gradient) where that is fast,
// for tokens enough, and no more than 1024 features on either side.
bool is_read_in_place(const at::Tensor& weight, int64_t row_tokens);

// x weight^T + bias and `update` in one pass: the update is summed in the registers that hold the projection.
// x [B, S, I], weight [O, I], bias [O] or undefined, and the banks, all float32 or all bfloat16 -> [B, S, O]. For a
// base selection the update is not read.
at::Tensor linear_with_update(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                              const ProjectionUpdate& update, const Selection& selection);

// A projection and the LoRA of `lora` (whose base is not read), which reads the same x.
LoraForward lora_projection(const at::Tensor& weight, const at::Tensor& bias, const LoraArguments& lora,
                            const Selection& selection);

}  // namespace torchgraft::ops::cpu
