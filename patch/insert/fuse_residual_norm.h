#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Puts torchgraft::residual_norm where `graph` has aten::layer_norm of the sum of two tensors, over the last dimension,
// with a weight and a bias (or none) that are dense floating-point parameters or constants of `module`, [H]. The sum
// may have other readers behind the norm. Where something writes into the operands between sum and norm, both stay.
// Returns the number of operators.
size_t fuse_residual_norm(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
