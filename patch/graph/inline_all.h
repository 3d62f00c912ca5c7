#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// Inlines all calls of functions and of modules' methods, but not those of an interface. torch::jit::Inline() alone
// leaves the calls of callees that were not optimised before: all where the executor's optimisation is off.
void inline_all(torch::jit::Graph& graph);

}  // namespace torchgraft
