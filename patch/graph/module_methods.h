#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// Gives `module` the method `name`, which runs `graph`; the name must be free.
torch::jit::Function& add_method(torch::jit::Module& module, const std::string& name,
                                 const std::shared_ptr<torch::jit::Graph>& graph, std::vector<c10::Argument> arguments,
                                 std::vector<c10::Argument> returns);

// Calls `visit` with the name and the graph of every method of `module` and of its submodules.
void for_each_method(
    const torch::jit::Module& module,
    const std::function<void(const std::string& name, const std::shared_ptr<torch::jit::Graph>& graph)>& visit);

// Removes a method from the class and from its compilation unit. Its name is free afterwards.
void remove_method(torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
