#pragma once

#include <ATen/core/Tensor.h>

namespace torchgraft::ops {

// The one place that decides whether an op's fused CPU kernel or its ATen composition runs. The composition is the
// reference that every fused kernel is tested against, and takes whatever a fused kernel does not: other devices and
// dtypes, tensors without memory of their own (fake, functional), and everything under TORCHGRAFT_KERNELS=reference.

// What all fused kernels ask of their operands.
bool takes_fused_kernels(const at::Tensor& x);

// Whether TORCHGRAFT_KERNELS=reference is set. Read once; `set_reference_kernels` overrules it (for tests).
bool reference_kernels();
void set_reference_kernels(bool reference);

}  // namespace torchgraft::ops
