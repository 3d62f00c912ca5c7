#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Lets linear maps see [batch, tokens, features] where a model has put all tokens one below the other:
//   y = linear(x.view(-1, in), ...)          linear(x, ...)
//   z = gelu(y), y * sigmoid(y), ...         the same, element by element
//   z.view(batch, tokens, out)               nothing, or a view of the same elements in the same order
// Run after raise_linear, which leaves only aten::linear. Hugging Face's Conv1D and some feed-forward blocks work on
// flattened rows.
void unflatten_rows(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
