#pragma once

#include <torchgraft/ops/composite/gated_lora_kernel.h>

namespace torchgraft::ops {

// The forward computation with what the gradient needs: gated_lora of x weight^T + bias. Checked arguments; args.base
// is not read. bias may be undefined. Symbolic sizes allowed.
LoraForward lora_linear_forward(const LoraArguments& args, const at::Tensor& weight, const at::Tensor& bias,
                                const Selection& selection);

}  // namespace torchgraft::ops
