#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// An `if` that adds a mask while it multiplies queries and keys, or does not, becomes a product and an `if` that adds:
//   baddbmm(mask, q, k.transpose(-2, -1)) if mask is not None else bmm(q, k.transpose(-2, -1))
//   scores = bmm(q, k.transpose(-2, -1));  scores + mask if mask is not None else scores
// So torch.nn.functional.multi_head_attention_forward writes it when attention weights are wanted. Run before
// raise_attention, which wants one product.
void hoist_score_product(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
