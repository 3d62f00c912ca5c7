#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// The code of torch.nn.MultiheadAttention asks again and again whether its input is batched. Where its body is inlined
// already (a scripted module that was frozen, or one that calls torch.nn.functional.multi_head_attention_forward), the
// questions are answered: the input has rank 3, which the graph asserts once, and its branches for rank 2 go away.
//
// Recognised by torch.nn's own error message for other ranks; no other code that asks for a rank is touched. Run before
// decompose_fused_encoder.
void fold_rank_checks(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
