#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Writes every linear map by a parameter of rank 2 as aten::linear(x, weight, bias):
//   matmul(x, w), mm(x, w), addmm(b, x, w)    weight = t(w); linear(x, v) for w = t(v)
//   linear(x, w) + b                          where b is a parameter of shape [out]
//   (y + linear(x, w)) + b                    y + linear(x, w, b): a residual written before the bias
// That covers Hugging Face's Conv1D and what torch.jit.optimize_for_inference makes of linear on the CPU.
void raise_linear(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
