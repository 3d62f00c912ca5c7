#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Other spellings of a linear map with a weight of rank 2 become aten::linear(x, weight, bias), which everything after
// this pass looks for:
//   addmm(b, x.view(-1, in), w).view(..., out)   (Conv1D of transformers' GPT-2; w is [in, out])
//   matmul(x, w), x @ w.t(), both with or without a following + b   (also what torch.jit.freeze leaves)
// Only where the weight is a parameter or a constant and x has its rank and width proven.
void lower_linear_forms(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
