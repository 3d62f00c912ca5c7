#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string_view>

namespace torchgraft {

// Whether an op of torchgraft, by its name, stands for a run of a slot.
bool is_counted(std::string_view op);

// The counted operators in a graph.
size_t count_ops(torch::jit::Graph& graph);

// Checks that the graphs of a grafted module are well-formed, hold exactly `ops` ops, and survive saving and loading.
// Throws c10::Error: a failure is a bug in torchgraft.
void verify_grafted(const torch::jit::Module& module, size_t ops);

}  // namespace torchgraft
