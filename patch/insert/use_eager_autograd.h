#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Keeps TorchScript's own differentiation out of a graph that is trained. It joins neighbouring operators into one node
// of the autograd graph, which holds all that they saved until each of them has run backwards, multiplies gradients by
// the factors (1) of additions, and computes those of frozen norms. Single operators it leaves to eager autograd, so
// this puts an aten::alias, a view that costs its call only, between neighbours. Returns how many. Same bits.
size_t use_eager_autograd(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
