#include <torchgraft/patch/module/exported_methods.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/module/methods.h>

#include <torch/csrc/jit/api/function_impl.h>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;

// Adds `method` and the methods of the same module that it calls, directly or not.
void add_called(const Module& module, const std::string& method, std::set<std::string>& called) {
  const auto found = module.find_method(method);
  auto* function = found ? torch::jit::tryToGraphFunction(found->function()) : nullptr;
  if (!called.insert(method).second || !function) {
    return;
  }
  const auto graph = function->graph();
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == c10::prim::CallMethod && node->input(0)->type() == module.type()) {
      add_called(module, node->s(c10::attr::name), called);
    }
  });
}

}  // namespace

std::set<std::string> called_by_forward(const Module& module) {
  std::set<std::string> called;
  add_called(module, "forward", called);
  if (module.find_method(kOriginalForward)) {
    add_called(module, kOriginalForward, called);
  }
  return called;
}

std::vector<std::string> exported_methods(const Module& module) {
  const std::set<std::string> called = called_by_forward(module);
  std::vector<std::string> result;
  for (const torch::jit::Function* method : module.type()->methods()) {
    if (!called.count(method->name()) && !method->name().starts_with("__")) {
      result.push_back(method->name());
    }
  }
  return result;
}

}  // namespace torchgraft
