#include <torchgraft/patch/insert/guard_attributes.h>

#include <ATen/core/interned_strings.h>
#include <torch/csrc/jit/ir/constants.h>

#include <cmath>
#include <sstream>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// Reads "encoder.scale" from the graph's self.
Value* insert_attribute(Graph& graph, const std::string& path) {
  Value* value = graph.inputs()[0];
  std::istringstream names(path);
  for (std::string name; std::getline(names, name, '.');) {
    value = graph.insertGetAttr(value, name);
  }
  return value;
}

std::string message(const ModuleAttribute& attribute) {
  std::ostringstream value;
  value << attribute.value;
  return "forward: '" + attribute.path + "' was " + value.str() +
         " when the adapters were grafted, or the module optimised, and the graph keeps that; set it before, on the "
         "base";
}

void insert_check(Graph& graph, Value* is_same, const ModuleAttribute& attribute) {
  Node* branch = graph.insertNode(graph.create(c10::prim::If, {is_same}, /*num_outputs=*/0));
  branch->addBlock();
  const torch::jit::WithInsertPoint otherwise(branch->addBlock());
  graph.insert(c10::prim::RaiseException, {message(attribute)});
}

}  // namespace

void guard_attributes(const std::shared_ptr<Graph>& graph, const std::vector<ModuleAttribute>& folded) {
  const torch::jit::WithInsertPoint begin(*graph->nodes().begin());
  for (const ModuleAttribute& attribute : folded) {
    if (attribute.value.isDouble() && std::isnan(attribute.value.toDouble())) {
      continue;  // equal to nothing
    }
    Value* current = insert_attribute(*graph, attribute.path);
    if (current->type()->kind() == c10::TypeKind::NoneType) {
      continue;  // can be nothing else
    }
    Value* expected = graph->insertConstant(attribute.value);
    if (attribute.value.isNone()) {
      insert_check(*graph, graph->insert(c10::aten::__is__, {current, expected}), attribute);
      continue;
    }
    if (current->type()->kind() == c10::TypeKind::OptionalType) {
      Value* none = graph->insertConstant(c10::IValue());
      insert_check(*graph, graph->insert(c10::aten::__isnot__, {current, none}), attribute);
      current = graph->insert(c10::prim::unchecked_unwrap_optional, {current});
    }
    insert_check(*graph, graph->insert(c10::aten::eq, {current, expected}), attribute);
  }
}

}  // namespace torchgraft
