#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/gate.h>

#include <optional>
#include <string_view>

namespace torchgraft::ops::cpu {

// What every gated op reads off x [B, S, I] in one pass: the narrow side of its update and the gate. float32, also of a
// bfloat16 x.
struct TokenReading {
  at::Tensor inner;   // [B, S, R]: x weight^T + bias; undefined unless asked for
  at::Tensor hidden;  // [B, S, R]: the activation of it. 0 in rows without an adapter; undefined without a weight
  Gate gate;          // as gate_forward has it
};

struct TokenReader {
  at::Tensor weight;  // [N, R, I]; undefined: the gate alone
  at::Tensor bias;    // [N, R]; may be undefined
  FusedActivation activation = FusedActivation::kIdentity;
  bool keep_inner = false;
};

// The kernel of a non-linearity, by its name in ops/activation.cpp; nullopt: ATen's is to be used.
std::optional<FusedActivation> fused_activation(std::string_view non_linearity);

// x and parameters all float32 or all bfloat16, on the CPU; not for a base selection.
TokenReading read_tokens(const at::Tensor& x, const TokenReader& reader, const RowArguments& rows,
                         const Selection& selection);

}  // namespace torchgraft::ops::cpu
