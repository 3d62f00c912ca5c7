#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops {

// The forward computation with what the gradient needs. Checked arguments; symbolic sizes allowed.
struct LoraForward {
  at::Tensor output;  // [B, S, O]
  Gate gate;
  at::Tensor hidden;  // [B, S, r]: x lora_a^T, before scaling and gate. Undefined for a base selection
};

LoraForward lora_forward(const LoraArguments& args, const Selection& selection);

// scaling[n] g[b] as [B, 1, 1] or [1, 1] in accumulation precision; g may be undefined.
at::Tensor lora_coefficient(const LoraArguments& args, const Selection& selection, const Gate& gate);

}  // namespace torchgraft::ops
