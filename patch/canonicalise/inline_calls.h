#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>

namespace torchgraft {

// May replace a method call on a module by other nodes, and destroy it; then it returns true.
using CallDecomposition = std::function<bool(torch::jit::Node* call)>;

// Replaces every method and function call by the callee's nodes, so that one flat graph is left. Offers each method
// call to `decompose_call` first, while the class is still visible: it decomposes library modules whose bodies hide
// attention. Throws c10::Error for a call that has no graph (an interface, a builtin function).
void inline_calls(const std::shared_ptr<torch::jit::Graph>& graph, const CallDecomposition& decompose_call);

}  // namespace torchgraft
