#pragma once

#include <torchgraft/ops/attention.h>

namespace torchgraft::ops::cpu {

// Whether attend() below takes these arguments: float32 or bfloat16, no dropout. What it does not take, ATen's composition does.
bool takes(const PrefixArguments& args);

// As ops::attend: one pass over prefix and sequence, head by head; nothing of size [S, S_k] is formed. Of bfloat16, the
// head at hand is widened.
AttentionForward attend(const PrefixArguments& args, const Prefix& prefix, const at::Tensor& mask);

}  // namespace torchgraft::ops::cpu
