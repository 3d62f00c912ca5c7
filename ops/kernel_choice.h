#pragma once

#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/kernel_mode.h>

namespace torchgraft::ops {

// The one place that decides whether an op's fused CPU kernel or its ATen composition runs. The composition is the
// reference that every fused kernel is tested against, and takes whatever a fused kernel does not: other devices and
// dtypes, tensors without memory of their own (fake, functional), empty ones, and batches without an adapter.

// What all fused kernels ask of their operands: x [B, S, I] float32 on the CPU.
bool takes_fused_kernels(const at::Tensor& x, const Selection& selection);

// The same without a look at the adapters, for what a fused kernel makes of the base too.
bool takes_fused_kernels(const at::Tensor& x);

}  // namespace torchgraft::ops
