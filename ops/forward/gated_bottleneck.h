#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

namespace torchgraft::ops {

// The forward computation with what the gradient needs. Checked arguments; symbolic sizes allowed.
struct BottleneckForward {
  at::Tensor output;  // [B, S, H]
  Gate gate;
  at::Tensor inner;   // [B, S, R]: the non-linearity's input. Undefined for a base selection, and where not kept
  at::Tensor hidden;  // [B, S, R]: the non-linearity's output
};

// What the fused kernels read off x: float32, also of a bfloat16 x. inner is undefined where it is not kept.
struct NarrowSide {
  Gate gate;
  at::Tensor inner;   // [B, S, R]
  at::Tensor hidden;  // [B, S, R], contiguous
};

// Arguments: those of gated_bottleneck or of gated_bottleneck_linear. Where takes_fused_kernels(), and not for a base
// selection.
template <typename Arguments>
NarrowSide fused_narrow_side(const Arguments& args, const Selection& selection, bool keep_inner);

// keep_inner: for a gradient that is computed from it.
BottleneckForward bottleneck_forward(const BottleneckArguments& args, const Selection& selection, bool keep_inner);

}  // namespace torchgraft::ops
