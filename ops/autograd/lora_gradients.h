#pragma once

#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/forward/gated_lora.h>
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

template <typename Arguments>
LoraInputs<at::Tensor> lora_inputs(const Arguments& args) {
  return {.x = args.x,
          .lora_a = args.lora_a,
          .lora_b = args.lora_b,
          .scaling = args.scaling,
          .gate = {args.rows.gate.weight, args.rows.gate.bias}};
}

// weight: of gated_lora_linear.
template <typename Arguments>
LoraSaved lora_saved(const Arguments& args, const LoraForward& result, const Selection& selection,
                     const at::Tensor& weight = {}) {
  return {.x = args.x,
          .weight = weight,
          .lora_a = args.lora_a,
          .lora_b = args.lora_b,
          .scaling = args.scaling,
          .gate_parameters = args.rows.gate,
          .hidden = result.hidden,
          .selection = selection,
          .gate = result.gate};
}

// x's gradient is that of the LoRA and of the projection, if there is one.
LoraInputs<at::Tensor> lora_backward(const LoraSaved& saved, const ResultGradients& grads,
                                     const LoraInputs<bool>& needs);

}  // namespace torchgraft::ops
