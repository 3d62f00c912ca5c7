#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <string>

namespace torchgraft {

// The name, for torchgraft::linear, of the function that `node` computes on its first input; empty: none that
// the operator takes over. Nodes that write in place are none.
std::string activation_name(const torch::jit::Node* node);

// Inserts the function `name` of `input`, any that torchgraft::linear knows, and returns its result: `input` for
// "linear". Throws c10::Error when there is no such function.
torch::jit::Value* insert_activation(torch::jit::Graph& graph, torch::jit::Value* input, const std::string& name);

}  // namespace torchgraft
