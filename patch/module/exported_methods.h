#pragma once

#include <torch/csrc/jit/api/module.h>

#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// The methods that forward consists of: itself, and those of the same module that it calls, directly or not.
std::set<std::string> called_by_forward(const torch::jit::Module& module);

// The methods of `module`, apart from forward, that forward does not call: those that somebody exported to call them
// directly (torch.jit.export). Adapters act in forward only.
std::vector<std::string> exported_methods(const torch::jit::Module& module);

}  // namespace torchgraft
