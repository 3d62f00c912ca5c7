#include <torchgraft/patch/module/module_of_graph.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <sstream>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// A path taken apart: {"encoder.layer.0", "weight"}.
std::pair<std::string, std::string> parent_and_name(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? std::pair("", path) : std::pair(path.substr(0, dot), path.substr(dot + 1));
}

class ModuleBuilder {
 public:
  ModuleBuilder(const Module& source, const char* what)
      : source_(source), what_(what), unit_(std::make_shared<torch::jit::CompilationUnit>()) {
    modules_.emplace("", make(source._ivalue()->type()->name()));
  }

  Module root() const { return modules_.at(""); }

  // The module at `path`, made with all above it.
  Module at(const std::string& path) {
    if (const auto found = modules_.find(path); found != modules_.end()) {
      return found->second;
    }
    const auto [above, name] = parent_and_name(path);
    Module parent = at(above);
    const Module child = make(source_type(path));
    parent.register_module(name, child);
    modules_.emplace(path, child);
    return child;
  }

  // Copies an attribute that `source` has.
  void copy(const std::string& path, const c10::IValue& held) {
    const auto [above, name] = parent_and_name(path);
    Module owner = at(above);
    if (owner.hasattr(name)) {
      return;
    }
    Module original = source_;
    std::istringstream names(above);
    for (std::string part; std::getline(names, part, '.');) {
      original = original.attr(part).toModule();
    }
    const auto& type = *original.type();
    const size_t slot = type.getAttributeSlot(name);
    if (held.isTensor() && type.is_parameter(slot)) {
      owner.register_parameter(name, held.toTensor(), /*is_buffer=*/false);
    } else if (held.isTensor() && type.is_buffer(slot)) {
      owner.register_parameter(name, held.toTensor(), /*is_buffer=*/true);
    } else {
      const bool is_data = !held.isObject() || is_packed_object(held);
      TORCH_CHECK(is_data, what_, ": the module's attribute ", path, " is an object of ", held.type()->str(),
                  ", which cannot be taken over");
      owner.register_attribute(name, type.getAttribute(slot), held);
    }
  }

  void add(const std::string& path, const c10::IValue& held) {
    const auto [above, name] = parent_and_name(path);
    Module owner = at(above);
    if (!owner.hasattr(name)) {
      owner.register_attribute(name, held.type(), held);
    }
  }

 private:
  Module make(const std::optional<c10::QualifiedName>& name) {
    Module result(name.value_or(c10::QualifiedName("__torch__.Module")), unit_, /*shouldMangle=*/true);
    result.register_attribute("training", c10::BoolType::get(), false);
    return result;
  }

  std::optional<c10::QualifiedName> source_type(const std::string& path) const {
    Module module = source_;
    std::istringstream names(path);
    for (std::string part; std::getline(names, part, '.');) {
      if (!module.hasattr(part) || !module.attr(part).isModule()) {
        return std::nullopt;
      }
      module = module.attr(part).toModule();
    }
    return module.type()->name();
  }

  Module source_;
  const char* what_;
  std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::map<std::string, Module> modules_;
};

void check_can_be_moved(const Node* node, const char* what) {
  TORCH_CHECK(node->kind() != c10::prim::SetAttr, what, ": forward assigns an attribute, ", node->s(c10::attr::name),
              "; write forward without state");
  const bool calls = node->kind() == c10::prim::CallMethod || node->kind() == c10::prim::fork;
  TORCH_CHECK(!calls, what, ": forward calls what cannot be inlined (", described(node), ")");
}

Value* insert_attribute(Graph& graph, Module module, const std::string& path) {
  Value* value = graph.inputs()[0];
  std::istringstream names(path);
  for (std::string name; std::getline(names, name, '.');) {
    value = graph.insertGetAttr(value, name);
  }
  return value;
}

}  // namespace

Module module_of_graph(const std::shared_ptr<Graph>& graph, const Module& source,
                       const std::multimap<std::string, NewAttribute>& added, const char* what) {
  for (const auto& [path, attribute] : added) {
    TORCH_INTERNAL_ASSERT(attribute.value->node()->kind() == c10::prim::Constant, path, " replaces no constant");
  }
  torch::jit::EliminateDeadCode(graph);
  ModuleBuilder builder(source, what);
  std::vector<std::pair<Value*, std::string>> reads;
  for_each_node(graph->block(), [&](Node* node) {
    check_can_be_moved(node, what);
    if (node->kind() != c10::prim::GetAttr) {
      return;
    }
    const auto attribute = resolve_attribute(node->output(), source);
    TORCH_CHECK(attribute, what, ": forward reads an attribute of what is no submodule: ", described(node));
    if (attribute->value.isModule()) {
      return;
    }
    builder.copy(attribute->path, attribute->value);
    reads.emplace_back(node->output(), attribute->path);
  });
  for (const auto& [path, attribute] : added) {
    builder.add(path, attribute.held);
    reads.emplace_back(attribute.value, path);
  }
  Module result = builder.root();
  // A new self, so that values of the old types can go.
  Value* old_self = graph->inputs()[0];
  Value* self = graph->insertInput(0, "self")->setType(result.type());
  for (const auto& [value, path] : reads) {
    const torch::jit::WithInsertPoint guard(value->node());
    value->replaceAllUsesWith(insert_attribute(*graph, result, path));
  }
  torch::jit::EliminateDeadCode(graph);
  TORCH_CHECK(old_self->uses().empty(), what, ": forward uses a submodule as a value (",
              described(old_self->uses().front().user), ")");
  graph->eraseInput(1);
  TORCH_INTERNAL_ASSERT(graph->inputs()[0] == self, "self is not the first input");
  const auto schema = source.get_method("forward").function().getSchema();
  std::vector<c10::Argument> arguments = schema.arguments();
  arguments.front() = c10::Argument("self", result.type());
  graph->lint();
  const bool is_same = graph->outputs()[0]->type()->isSubtypeOf(*schema.returns()[0].type());
  const c10::Argument returned = is_same ? schema.returns()[0] : c10::Argument("", graph->outputs()[0]->type());
  add_method(result, "forward", graph, std::move(arguments), {returned});
  return result;
}

}  // namespace torchgraft
