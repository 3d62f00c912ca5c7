#include <torchgraft/patch/graph/whole_graphs.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/module_methods.h>

#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <cctype>

namespace torchgraft {
namespace {

using c10::Argument;
using c10::ClassType;
using torch::jit::Function;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

std::shared_ptr<Graph> graph_of(const ClassType& type, const std::string& method) {
  Function& function = type.getMethod(method);
  function.ensure_defined();
  return torch::jit::toGraphFunction(function).graph();
}

bool is_self(const Value* value) { return value == value->owningGraph()->inputs()[0]; }

// The calls in `graph` of other methods of the module itself.
std::vector<Node*> calls_of_self(Graph& graph) {
  std::vector<Node*> calls;
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() == c10::prim::CallMethod && is_self(node->input(0))) {
      calls.push_back(node);
    }
  });
  return calls;
}

void inline_calls_of_self(Graph& graph, const ClassType& type) {
  for (auto calls = calls_of_self(graph); !calls.empty(); calls = calls_of_self(graph)) {
    for (Node* call : calls) {
      const auto callee = graph_of(type, call->s(c10::attr::name));
      replace_node(call, insert_graph_before(call, *callee, call->inputs()));
    }
  }
}

bool only_reads_attributes(const Graph& graph) {
  const auto& uses = graph.inputs()[0]->uses();
  return std::all_of(uses.begin(), uses.end(),
                     [](const torch::jit::Use& use) { return use.user->kind() == c10::prim::GetAttr; });
}

std::string argument_name(const std::string& attribute) {
  std::string name = "own_" + attribute;  // names of submodules may be numbers
  std::replace_if(name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c); }, '_');
  return name;
}

// Makes an input of every attribute of the root that `graph` reads. Returns their names, in the order of the inputs,
// which stand behind self.
std::vector<std::string> attributes_as_inputs(Graph& graph, const ClassType& root) {
  std::vector<std::string> names;
  const auto uses = graph.inputs()[0]->uses();  // a copy: the list changes
  for (const torch::jit::Use& use : uses) {
    const std::string name = use.user->s(c10::attr::name);
    auto position = std::find(names.begin(), names.end(), name);
    if (position == names.end()) {
      position = names.insert(names.end(), name);
      graph.insertInput(names.size(), argument_name(name))->setType(root.getAttribute(name));
    }
    replace_node(use.user, graph.inputs()[position - names.begin() + 1]);
  }
  return names;
}

Value* insert_call(Graph& graph, const std::string& name, at::ArrayRef<Value*> inputs, const c10::TypePtr& result) {
  Node* call = graph.create(c10::prim::CallMethod, inputs, 1);
  call->s_(c10::attr::name, name);
  call->output()->setType(result);
  return graph.insertNode(call)->output();
}

// The calls in `graph` of the method `name` of the submodule.
std::vector<Node*> calls_of_whole_graph(Graph& graph, const std::string& name) {
  std::vector<Node*> calls;
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() != c10::prim::CallMethod || node->s(c10::attr::name) != name) {
      return;
    }
    const Node* owner = node->input(0)->node();
    if (owner->kind() == c10::prim::GetAttr && owner->s(c10::attr::name) == kWholeGraphs && is_self(owner->input())) {
      calls.push_back(node);
    }
  });
  return calls;
}

bool stands_in_submodule(const Module& module, const std::string& name) {
  return module.hasattr(kWholeGraphs) && module.attr(kWholeGraphs).toModule().find_method(name);
}

// Moves `graph` into the submodule, as its method `name`. Returns the attributes of the root that it takes.
std::vector<std::string> add_to_submodule(const Module& module, const std::string& name,
                                          const std::shared_ptr<Graph>& graph, const std::vector<Argument>& arguments,
                                          std::vector<Argument> returns) {
  Module graphs = module.attr(kWholeGraphs).toModule();
  std::vector<std::string> attributes = attributes_as_inputs(*graph, *module.type());
  graph->inputs()[0]->setType(graphs.type());
  std::vector<Argument> all = {Argument("self", graphs.type())};
  for (size_t i = 0; i < attributes.size(); ++i) {
    all.emplace_back(argument_name(attributes[i]), graph->inputs()[i + 1]->type());
  }
  all.insert(all.end(), arguments.begin() + 1, arguments.end());
  add_method(graphs, name, graph, std::move(all), std::move(returns));
  return attributes;
}

// The call's inputs where the submodule's method takes `attributes` of `self`, then `rest`.
std::vector<Value*> inputs_of_call(Graph& graph, Value* self, const std::vector<std::string>& attributes,
                                   at::ArrayRef<Value*> rest) {
  std::vector<Value*> inputs = {graph.insertGetAttr(self, kWholeGraphs)};
  for (const std::string& attribute : attributes) {
    inputs.push_back(graph.insertGetAttr(self, attribute));
  }
  inputs.insert(inputs.end(), rest.begin(), rest.end());
  return inputs;
}

}  // namespace

void add_whole_graphs(Module& module) {
  const auto unit = module._ivalue()->compilation_unit();
  Module graphs(c10::QualifiedName("__torch__.torchgraft.WholeGraphs"), unit, /*shouldMangle=*/true);
  graphs.register_attribute("training", c10::BoolType::get(), module.attr("training", c10::IValue(false)).toBool());
  module.register_module(kWholeGraphs, graphs);
}

void add_whole_graph(Module& module, const std::string& name, const std::shared_ptr<Graph>& graph,
                     std::vector<Argument> arguments, std::vector<Argument> returns) {
  inline_calls_of_self(*graph, *module.type());
  if (!only_reads_attributes(*graph)) {
    add_method(module, name, graph, std::move(arguments), std::move(returns));
    return;
  }
  const std::vector<std::string> attributes = add_to_submodule(module, name, graph, arguments, returns);
  const auto calling = std::make_shared<Graph>();
  for (const Argument& argument : arguments) {
    const bool first = calling->inputs().empty();
    calling->addInput(argument.name())->setType(first ? c10::TypePtr(module.type()) : argument.type());
  }
  const WithInsertPoint guard(calling->return_node());
  const auto inputs = inputs_of_call(*calling, calling->inputs()[0], attributes, calling->inputs().slice(1));
  calling->registerOutput(insert_call(*calling, name, inputs, returns[0].type()));
  add_method(module, name, calling, std::move(arguments), std::move(returns));
}

Value* insert_whole_graph_call(Graph& graph, const Module& module, const std::string& name,
                               at::ArrayRef<Value*> inputs) {
  const auto result = module.get_method(name).function().getSchema().returns()[0].type();
  return stands_in_submodule(module, name) ? torch::jit::insertGraph(graph, *graph_of(*module.type(), name), inputs)[0]
                                           : insert_call(graph, name, inputs, result);
}

std::shared_ptr<Graph> whole_graph(const Module& module, const std::string& name) {
  const auto graph = graph_of(*module.type(), name)->copy();
  for (Node* call : calls_of_whole_graph(*graph, name)) {
    Node* graphs = call->input(0)->node();
    const auto callee = graph_of(*module.attr(kWholeGraphs).toModule().type(), name);
    replace_node(call, insert_graph_before(call, *callee, call->inputs()));
    graphs->destroy();
  }
  return graph;
}

void replace_whole_graph(Module& module, const std::string& name, const std::shared_ptr<Graph>& graph) {
  const auto schema = module.get_method(name).function().getSchema();
  if (!stands_in_submodule(module, name)) {
    remove_method(module, name);
    add_method(module, name, graph, schema.arguments(), schema.returns());
    return;
  }
  TORCH_INTERNAL_ASSERT(only_reads_attributes(*graph), "the new graph of ", name, " needs the module itself");
  Module graphs = module.attr(kWholeGraphs).toModule();
  remove_method(graphs, name);
  const auto attributes = add_to_submodule(module, name, graph, schema.arguments(), schema.returns());
  for (Function* method : module.type()->methods()) {
    const auto calling = graph_of(*module.type(), method->name());
    for (Node* call : calls_of_whole_graph(*calling, name)) {
      const WithInsertPoint before(call);
      const auto rest = call->inputs().slice(call->inputs().size() + 1 - schema.arguments().size());
      const auto inputs = inputs_of_call(*calling, calling->inputs()[0], attributes, rest);
      replace_node(call, {insert_call(*calling, name, inputs, schema.returns()[0].type())});
    }
    torch::jit::EliminateDeadCode(calling);
  }
}

void remove_whole_graphs(Module& module) {
  if (!module.hasattr(kWholeGraphs)) {
    return;
  }
  Module graphs = module.attr(kWholeGraphs).toModule();
  for (const Function* method : std::vector<Function*>(graphs.type()->methods())) {
    remove_method(graphs, method->name());
  }
  module._ivalue()->unsafeRemoveAttr(kWholeGraphs);
  module.type()->unsafeRemoveAttribute(kWholeGraphs);
}

}  // namespace torchgraft
