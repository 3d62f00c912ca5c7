#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <string>
#include <vector>

// Helpers of the patcher's tests: modules from TorchScript text, graphs that run.
namespace torchgraft::testing {

// A module with the given parameters and, after them, the methods of `source`.
inline torch::jit::Module make_module(const std::vector<std::pair<std::string, at::Tensor>>& parameters,
                                      const std::string& source) {
  torch::jit::Module module("TestModule");
  module.register_attribute("training", c10::BoolType::get(), false);
  for (const auto& [name, tensor] : parameters) {
    module.register_parameter(name, tensor, /*is_buffer=*/false);
  }
  module.define(source);
  return module;
}

// The result of `graph`, whose first input is `module`, on `inputs`.
inline c10::IValue run_graph(const torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph,
                             std::vector<c10::IValue> inputs) {
  torch::jit::CompilationUnit unit;
  torch::jit::Function* function = unit.create_function(c10::QualifiedName("run"), graph->copy());
  inputs.insert(inputs.begin(), module._ivalue());
  return (*function)(std::move(inputs));
}

inline size_t count_kind(const torch::jit::Graph& graph, const std::string& kind) {
  size_t count = 0;
  const std::function<void(const torch::jit::Block*)> visit = [&](const torch::jit::Block* block) {
    for (const torch::jit::Node* node : block->nodes()) {
      count += node->kind().toQualString() == kind;
      for (const torch::jit::Block* inner : node->blocks()) {
        visit(inner);
      }
    }
  };
  visit(graph.block());
  return count;
}

inline double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// The message of the c10::Error that `action` throws; empty when it throws none.
inline std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

}  // namespace torchgraft::testing
