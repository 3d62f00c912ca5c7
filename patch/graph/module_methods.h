#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// Gives `module` the method `name`, which runs `graph`; the name must be free.
torch::jit::Function& add_method(torch::jit::Module& module, const std::string& name,
                                 const std::shared_ptr<torch::jit::Graph>& graph, std::vector<c10::Argument> arguments,
                                 std::vector<c10::Argument> returns);

// Takes a method out of the class and out of its compilation unit, so that the name is free again.
void remove_method(torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
