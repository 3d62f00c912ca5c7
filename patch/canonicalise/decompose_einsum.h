#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Rewrites aten::einsum of two tensors by a constant equation where it is
//   a linear map: one operand is a parameter, and every letter that both have is summed over
//       "bsd,dhk->bshk": aten::linear on the parameter as [out, in], then unflatten;
//   a batched product: "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd": permutes and aten::matmul of [batch..., rows, columns].
// Leaves einsums as they are that have an ellipsis or a repeated letter, that sum over a letter of one operand alone,
// or whose product has several row or column letters.
void decompose_einsum(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
