#pragma once

#include <torchgraft/ops/forward/gated_lora.h>

namespace torchgraft::ops {

// As lora_forward, with the linear map that the LoRA updates.
LoraForward lora_linear_forward(const LoraLinearArguments& args, const Selection& selection);

}  // namespace torchgraft::ops
