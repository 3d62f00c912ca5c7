#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <memory>
#include <string>

namespace torchgraft {

// An attribute that a module gets beside those that its graph reads.
struct NewAttribute {
  torch::jit::Value* value;  // a value of the graph that the attribute replaces
  c10::IValue held;
};

// A module of its own types whose only method, forward, runs `graph`: a flat graph of `source`, whose forward's
// arguments it has. It has the attributes that the graph reads, at the same paths, and those of `added`, by path;
// parameters stay parameters, and share the memory of source's. `graph` becomes the module's.
//
// Throws c10::Error, on behalf of the function `what`, when the graph assigns attributes, or reads what is neither data
// nor a packed weight.
torch::jit::Module module_of_graph(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& source,
                                   const std::multimap<std::string, NewAttribute>& added, const char* what);

}  // namespace torchgraft
