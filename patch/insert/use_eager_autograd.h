#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Keeps TorchScript's own differentiation out of a graph that is trained. TorchScript joins neighbouring operators into
// one node of the autograd graph. Such a node holds all that its operators saved until each has run backwards,
// multiplies gradients by the factors (1) of additions, and computes gradients of frozen norms. TorchScript leaves
// single operators to eager autograd. So this pass puts an aten::alias, a view that costs no more than its call,
// between neighbours. Results keep their bits. Returns the number of aliases.
size_t use_eager_autograd(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
