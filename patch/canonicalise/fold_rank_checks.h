#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// torch.nn.MultiheadAttention asks again and again whether its input is batched. Where its body is inlined already (a
// scripted module that was frozen, or one that calls torch.nn.functional.multi_head_attention_forward), this pass
// answers that the input has rank 3. The graph asserts the rank once, and the branches for rank 2 go away.
//
// Knows that code by torch.nn's error message for other ranks, and leaves all other code that asks for a rank alone.
// Run before decompose_fused_encoder.
void fold_rank_checks(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
