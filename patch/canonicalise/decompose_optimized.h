#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes all that optimize() puts into a graph as ATen's operators: what decompose_linear() and
// decompose_residual_norm() do.
void decompose_optimized(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
