#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <set>
#include <string>

namespace torchgraft {

// The nodes of `graph` that run inside a scripted `with torch.autocast(...)` that is turned on, those of inner blocks
// included. TorchScript casts there for operators of its own, and for no others. `device`: only what casts for tensors
// there ("cpu"); empty: for any.
std::set<const torch::jit::Node*> nodes_under_autocast(torch::jit::Graph& graph, const std::string& device = "");

}  // namespace torchgraft
