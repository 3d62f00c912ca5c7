#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes torchgraft::residual_norm, which optimize() puts into a graph, as aten::add and aten::layer_norm: by
// definition the same, up to rounding.
void decompose_residual_norm(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
