#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Writes torchgraft::linear, which optimize() puts into a graph, as aten::linear and the function that follows it: by
// definition the same, up to rounding. Passes and sites so see an optimised module as they see any other. What
// names its non-linearity at run time only stays.
void decompose_linear(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
