#pragma once

#include <ATen/core/Tensor.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/kernel_table.h>

namespace torchgraft::ops {

// The one place that decides whether an operator's fused CPU kernel or its ATen composition runs. The composition is
// the reference that every fused kernel is tested against. It runs wherever a fused kernel cannot: on other devices and
// dtypes, on tensors without memory of their own (fake, functional, meta) and on empty ones.

// Whether x has elements on the CPU that a kernel can read.
bool has_memory(const at::Tensor& x);

// Whether `op` runs its fused kernel on x: [B, S, I], or a query [B, h, S, d], float32 or bfloat16, with memory. In
// KernelMode::kAuto the user's own table decides (TORCHGRAFT_KERNEL_TABLE names its file, which is read once; a damaged
// one throws c10::Error). Without a table, or where it says nothing, the fused kernels run where they were measured to
// be faster.
bool takes_fused_kernels(FusedOp op, const at::Tensor& x);

// The same without the table, for parts that several operators share.
bool takes_fused_kernels(const at::Tensor& x);

// The same for the gradient kernels: x and the incoming gradient are float32 and have memory.
bool takes_fused_gradients(const at::Tensor& x, const at::Tensor& grad);

}  // namespace torchgraft::ops
