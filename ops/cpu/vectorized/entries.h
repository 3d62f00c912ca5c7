#pragma once

#include <torchgraft/ops/cpu/kernels.h>

// What table.cpp collects, in a namespace of each instruction set's own.
#define TORCHGRAFT_JOIN_2(a, b) a##b
#define TORCHGRAFT_JOIN(a, b) TORCHGRAFT_JOIN_2(a, b)
#define TORCHGRAFT_VECTORIZED TORCHGRAFT_JOIN(vectorized_, TORCHGRAFT_INSTRUCTION_SET)

namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED {

void dot_product(const DotProduct& job);
void token_product(const DotProduct& job);
void token_product_bfloat16(const DotProduct& job);  // in a copy of its own, for AVX512-BF16
void outer_product(const OuterProduct& job);
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, const float* scale, float* to,
               int64_t to_stride);
void widen(const c10::BFloat16* from, int64_t count, float* to);
void narrow(const float* from, int64_t count, c10::BFloat16* to);
void activate(FusedActivation activation, float* values, int64_t count);
void normalize(const float* x, int64_t count, float mean, float inverse, const float* weight, const float* bias,
               float* to);
void residual_norm(const float* x, const float* residual, int64_t count, const float* weight, const float* bias,
                   float eps, float* sum, float* to);
int64_t attention_workspace(const HeadAttention& job);
void attention(const HeadAttention& job);
int64_t attention_gradient_workspace(const HeadAttentionGradient& job);
void attention_gradient(const HeadAttentionGradient& job);

}  // namespace torchgraft::ops::cpu::TORCHGRAFT_VECTORIZED
