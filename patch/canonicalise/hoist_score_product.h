#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Takes the product of queries and keys out of an `if` that adds a mask on one of its sides:
//   baddbmm(mask, q, k.transpose(-2, -1)) if mask is not None else bmm(q, k.transpose(-2, -1))
//   scores = bmm(q, k.transpose(-2, -1));  scores + mask if mask is not None else scores
// torch.nn.functional.multi_head_attention_forward is written so for attention weights. Run before raise_attention,
// which needs one product.
void hoist_score_product(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
