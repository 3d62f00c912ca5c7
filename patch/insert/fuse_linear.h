#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Puts torchgraft::linear where `graph` has aten::linear whose weight and bias are dense floating-point parameters or
// constants of `module`, [O, I] and [O]. A GELU, ReLU, SiLU, tanh or sigmoid that alone reads the result becomes part
// of it. Returns the number of operators.
size_t fuse_linear(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
