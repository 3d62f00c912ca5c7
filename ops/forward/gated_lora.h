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

// scaling[n] g[b] as [B, 1, 1] or [1, 1], in accumulation precision of x's dtype `type`. scaling: the bank; g may be
// undefined.
at::Tensor lora_coefficient(const at::Tensor& scaling, const Selection& selection, const Gate& gate,
                            at::ScalarType type);

}  // namespace torchgraft::ops
