#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/kernel_table.h>

namespace torchgraft::ops {

// The one place that decides whether an op's fused CPU kernel or its ATen composition runs. The composition is the
// reference that every fused kernel is tested against, and takes whatever a fused kernel does not: other devices and
// dtypes, tensors without memory of their own (fake, functional), empty ones, and batches without an adapter.

// Whether `op` does. x: [B, S, I], or a query [B, h, S, d], float32 or bfloat16 on the CPU. In KernelMode::kAuto, what
// the user's own table says (TORCHGRAFT_KERNEL_TABLE names its file, which is read once; a damaged one throws
// c10::Error); without one, or where it says nothing, what was measured to be fast.
bool takes_fused_kernels(FusedOp op, const at::Tensor& x);

// Whether x has elements on the CPU that a kernel can read: what the functions here ask of x beside its dtype.
bool has_memory(const at::Tensor& x);

// The same without the table, for what is part of several ops.
bool takes_fused_kernels(const at::Tensor& x);

// The same for the gradient kernels: float32, and an incoming gradient with memory of its own.
bool takes_fused_gradients(const at::Tensor& x, const at::Tensor& grad);

}  // namespace torchgraft::ops
