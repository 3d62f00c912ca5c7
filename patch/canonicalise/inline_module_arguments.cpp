#include <torchgraft/patch/canonicalise/inline_module_arguments.h>

#include <torchgraft/patch/canonicalise/inline_calls.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/module_methods.h>

#include <torch/csrc/jit/api/function_impl.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace torchgraft {

using c10::Argument;
using c10::FunctionSchema;
using torch::jit::Function;
using torch::jit::Module;
using torch::jit::Node;

namespace {

using MethodId = std::pair<const c10::ClassType*, std::string>;

bool takes_module(const Function& method) {
  const auto& arguments = method.getSchema().arguments();
  return std::any_of(arguments.begin() + 1, arguments.end(),
                     [](const Argument& argument) { return argument.type()->is_module(); });
}

bool calls_one_of(Function& method, const std::set<MethodId>& methods) {
  auto* function = torch::jit::tryToGraphFunction(method);
  bool found = false;
  if (function) {
    for_each_node(function->graph()->block(), [&](Node* node) {
      const auto type =
          node->kind() == c10::prim::CallMethod ? node->input(0)->type()->cast<c10::ClassType>() : nullptr;
      found = found || (type && methods.count({type.get(), node->s(c10::attr::name)}));
    });
  }
  return found;
}

}  // namespace

void inline_module_arguments(Module& module) {
  std::map<MethodId, Module> broken;
  std::set<MethodId> ids;
  for (size_t before = ids.size() + 1; before != ids.size();) {  // callers of what is broken are broken
    before = ids.size();
    for (const Module& inner : module.modules()) {
      for (Function* method : inner.type()->methods()) {
        if (takes_module(*method) || calls_one_of(*method, ids)) {
          const MethodId id(inner.type().get(), method->name());
          ids.insert(id);
          broken.emplace(id, inner);
        }
      }
    }
  }
  const MethodId forward(module.type().get(), "forward");
  if (!ids.count(forward)) {
    return;
  }
  const FunctionSchema schema = module.get_method("forward").function().getSchema();
  const auto graph = module.get_method("forward").graph()->copy();
  inline_calls(graph, [](Node*) { return false; });
  for (auto& [id, inner] : broken) {
    remove_method(inner, id.second);
  }
  add_method(module, "forward", graph, schema.arguments(), schema.returns());
}

}  // namespace torchgraft
