#pragma once

#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops {

// What the gradients of gated_lora and gated_lora_linear share.

// A value for each differentiable argument that both have.
template <typename Value>
struct LoraInputs {
  Value x{};
  Value lora_a{};
  Value lora_b{};
  Value scaling{};
  GateInputs<Value> gate{};
};

struct LoraSaved {
  at::Tensor x;         // [B, S, I]
  at::Tensor weight{};  // [O, I], of gated_lora_linear; undefined in gated_lora
  at::Tensor lora_a;    // [N, r, I]
  at::Tensor lora_b;    // [N, O, r]
  at::Tensor scaling;   // [N]
  GateParameters gate_parameters;
  at::Tensor hidden;  // [B, S, r]: x lora_a^T; undefined for a base selection
  Selection selection;
  Gate gate;

  std::vector<at::Tensor*> tensors() { return {&x, &weight, &lora_a, &lora_b, &scaling, &hidden}; }
};

// x's gradient is that of the LoRA and of the projection, if there is one.
LoraInputs<at::Tensor> lora_backward(const LoraSaved& saved, const ResultGradients& grads,
                                     const LoraInputs<bool>& needs);

}  // namespace torchgraft::ops
