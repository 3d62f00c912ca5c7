#pragma once

#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/gate.h>

#include <optional>

namespace torchgraft::ops::cpu {

// What one pass over x [B, S, I] computes: the narrow side of an operator's update, and its gate. float32, also for a
// bfloat16 x.
struct TokenReading {
  at::Tensor inner;   // [B, S, R]: x weight^T + bias; undefined unless asked for
  at::Tensor hidden;  // [B, S, R]: the activation of inner. 0 in base rows; undefined without a weight
  Gate gate;          // as gate_forward returns it
};

struct TokenReader {
  at::Tensor weight{};  // [N, R, I]; undefined: the gate alone
  at::Tensor bias{};    // [N, R]; may be undefined
  FusedActivation activation = FusedActivation::kIdentity;
  bool keep_inner = false;
};

// The kernel of a non-linearity; nullopt: there is none, ATen computes it.
std::optional<FusedActivation> fused_activation(NonLinearity function);

// x and parameters all float32 or all bfloat16, on the CPU; not for a base selection.
TokenReading read_tokens(const at::Tensor& x, const TokenReader& reader, const RowArguments& rows,
                         const Selection& selection);

}  // namespace torchgraft::ops::cpu
