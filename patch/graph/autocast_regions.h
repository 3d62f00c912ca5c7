#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <set>

namespace torchgraft {

// The nodes of `graph` that run inside a scripted `with`, those of inner blocks included; `with torch.no_grad()` and
// its like do not count, nor does autocast that is turned off. TorchScript casts there for operators of its own, and
// for no others.
std::set<const torch::jit::Node*> nodes_under_autocast(torch::jit::Graph& graph);

}  // namespace torchgraft
