#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <string>

namespace torchgraft {

// The non-linearities that the operator `linear` takes over, as nodes. Both functions know the same names.

// The name, for torchgraft::linear, of the function that `node` computes on its first input; empty: none of them.
// Nodes that write in place are none.
std::string activation_name(const torch::jit::Node* node);

// Inserts that function of `input`, and returns its result; null when `name` is none of them ("linear" gives `input`).
torch::jit::Value* insert_activation(torch::jit::Graph& graph, torch::jit::Value* input, const std::string& name);

}  // namespace torchgraft
