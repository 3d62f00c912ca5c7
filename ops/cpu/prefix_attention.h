#pragma once

#include <torchgraft/ops/attention.h>

#include <vector>

namespace torchgraft::ops::cpu {

// Whether attend() below runs: float32 or bfloat16, no dropout, and kernel_choice.h says so. Elsewhere ATen's
// composition does.
bool takes_fused_attention(const PrefixArguments& args);

// Whether attend() below takes the bank and the rows of a mixed selection instead of a copy of each row's slice: dense
// banks of float32.
bool reads_bank_in_place(const PrefixArguments& args, const Selection& selection);

// As ops::attend: one pass over prefix and sequence, head by head; nothing of size [S, S_k] is formed. bfloat16 is
// widened one head at a time.
AttentionForward attend(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& mask);

// What attend() and its gradient share.

// additive_mask(args) as [B, h, S, S_k] of float32; undefined without a mask.
at::Tensor expanded_mask(const PrefixArguments& args, const at::Tensor& mask);

// The mask of one head, for a job of HeadAttention or HeadAttentionGradient.
template <typename Job>
void set_mask(Job& job, const at::Tensor& expanded, int64_t row, int64_t head) {
  if (expanded.defined()) {
    job.mask = expanded.const_data_ptr<float>() + row * expanded.stride(0) + head * expanded.stride(1);
    job.mask_row_stride = expanded.stride(2);
    job.mask_column_stride = expanded.stride(3);
  }
}

at::Tensor with_dense_rows(const at::Tensor& tensor);                      // elements of a row are neighbours
std::vector<int64_t> prefix_lengths(const Prefix& prefix, int64_t batch);  // positions that each batch row uses

}  // namespace torchgraft::ops::cpu
