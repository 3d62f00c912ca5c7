#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/composite/gated_lora_kernel.h>

namespace torchgraft::ops::cpu {

// x weight^T + bias and the LoRA of `lora` (whose base is not read) in one pass over x; the update is summed in the
// registers that hold the projection. x [B, S, I], weight [O, I], bias [O] or undefined; all float32 or all bfloat16.
LoraForward lora_projection(const at::Tensor& weight, const at::Tensor& bias, const LoraArguments& lora,
                            const Selection& selection);

}  // namespace torchgraft::ops::cpu
