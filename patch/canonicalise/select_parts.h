#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Replaces what is selected from stacked tensors by the tensor itself, also behind torch.cat along another dimension:
// a cache that holds keys and values in one tensor.
void select_parts(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
