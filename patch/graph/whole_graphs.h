#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <string>
#include <vector>

namespace torchgraft {

// The submodule whose methods are the graphs of a grafted module's base_forward and grafted_forward.
//
// torch.jit.freeze() frees the root's methods but for forward. What forward has inlined still points to them, and the
// interpreter looks there when a node throws. It does not free methods of submodules that are read no more. So the
// graphs stand in a submodule, with what they read of the root as their first arguments, and both forward and the
// root's methods call them there. A submodule can name the types of its siblings, but not that of the root.
constexpr const char* kWholeGraphs = "whole_graphs";

// Adds the submodule, empty. It must stand behind all others: Module::clone(), which freezing begins with, renews the
// types that methods name in the order of the attributes.
void add_whole_graphs(torch::jit::Module& module);

// Gives `module` the method `name`, which runs `graph`: by a call of the submodule's method of that name, or, where the
// graph needs the root itself (it assigns an attribute, say), as it is.
void add_whole_graph(torch::jit::Module& module, const std::string& name,
                     const std::shared_ptr<torch::jit::Graph>& graph, std::vector<c10::Argument> arguments,
                     std::vector<c10::Argument> returns);

// Inserts a call of what add_whole_graph() added. The first of `inputs` is the module.
torch::jit::Value* insert_whole_graph_call(torch::jit::Graph& graph, const torch::jit::Module& module,
                                           const std::string& name, at::ArrayRef<torch::jit::Value*> inputs);

// A copy of the graph that the method `name` runs, whichever way it was added.
std::shared_ptr<torch::jit::Graph> whole_graph(const torch::jit::Module& module, const std::string& name);

// Makes `graph` what the method `name` runs. Callers find both methods by their names.
void replace_whole_graph(torch::jit::Module& module, const std::string& name,
                         const std::shared_ptr<torch::jit::Graph>& graph);

// Removes the submodule, if there is one.
void remove_whole_graphs(torch::jit::Module& module);

}  // namespace torchgraft
