#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/autograd/products.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops {

// What gated_lora and gated_lora_linear share.

struct LoraNeeds {
  bool x, lora_a, lora_b, scaling, gate_weight, gate_bias;
};

struct LoraGradients {
  at::Tensor x;  // [B, S, I]
  at::Tensor lora_a, lora_b, scaling, gate_weight, gate_bias;
};

// grad [B, S, O] and grad_gate [B, 1]: of output and gate; undefined: that result was not used. args without base;
// hidden [B, S, r] and gate: of the forward pass. linear: what else reads x, if anything; x's gradient is of both. Not
// for a base selection.
LoraGradients lora_backward(const LoraArguments& args, const Selection& selection, const Gate& gate,
                            const at::Tensor& hidden, const at::Tensor& grad, const at::Tensor& grad_gate,
                            const LoraNeeds& needs, const LinearGradient& linear);

}  // namespace torchgraft::ops
