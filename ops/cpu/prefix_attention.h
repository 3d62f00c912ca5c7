#pragma once

#include <torchgraft/ops/attention.h>

#include <vector>

namespace torchgraft::ops::cpu {

// Whether attend() below takes these arguments: float32 or bfloat16, no dropout. What it does not take, ATen's
// composition does.
bool takes(const PrefixArguments& args);

// As ops::attend: one pass over prefix and sequence, head by head; nothing of size [S, S_k] is formed. Of bfloat16, the
// head at hand is widened.
AttentionForward attend(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& mask);

// What its gradient shares.
at::Tensor with_dense_rows(const at::Tensor& tensor);                      // elements of a row are neighbours
std::vector<int64_t> prefix_lengths(const Prefix& prefix, int64_t batch);  // positions that each batch row uses

}  // namespace torchgraft::ops::cpu
