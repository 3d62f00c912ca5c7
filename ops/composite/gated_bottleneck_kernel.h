#pragma once

#include <torchgraft/ops/activation.h>
#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops {

// The forward computation with what the gradient needs. Checked arguments; symbolic sizes allowed.
struct BottleneckForward {
  at::Tensor output;  // [B, S, H]
  Gate gate;
  at::Tensor inner;   // [B, S, R]: the non-linearity's input. Undefined for a base selection
  at::Tensor hidden;  // [B, S, R]: the non-linearity's output
};

BottleneckForward bottleneck_forward(const BottleneckArguments& args, const Selection& selection);

}  // namespace torchgraft::ops
