#include <torchgraft/patch/graph/module_methods.h>

#include <torch/csrc/jit/api/function_impl.h>

namespace torchgraft {

using c10::Argument;
using c10::FunctionSchema;
using torch::jit::Function;
using torch::jit::Graph;
using torch::jit::Module;

Function& add_method(Module& module, const std::string& name, const std::shared_ptr<Graph>& graph,
                     std::vector<Argument> arguments, std::vector<Argument> returns) {
  const auto unit = module._ivalue()->compilation_unit();
  const c10::QualifiedName qualified(*module.type()->name(), name);
  Function* function = unit->create_function(qualified, graph);
  module.type()->addMethod(function);
  function->setSchema(FunctionSchema(name, "", std::move(arguments), std::move(returns)));
  return *function;
}

void for_each_method(const Module& module,
                     const std::function<void(const std::string& name, const std::shared_ptr<Graph>& graph)>& visit) {
  for (const Module& each : module.modules()) {
    for (Function* method : each.type()->methods()) {
      if (const auto* function = torch::jit::tryToGraphFunction(*method)) {
        visit(method->name(), function->graph());
      }
    }
  }
}

void remove_method(Module& module, const std::string& name) {
  const c10::QualifiedName qualified(*module.type()->name(), name);
  module.type()->unsafeRemoveMethod(name);
  module._ivalue()->compilation_unit()->unsafeRemoveMethod(qualified);
}

}  // namespace torchgraft
