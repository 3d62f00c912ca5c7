#include <torchgraft/patch/graph/activation_node.h>

#include <torchgraft/activations/activation.h>
#include <torchgraft/patch/graph/activation_source.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <array>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr std::array<std::pair<const char*, c10::Symbol>, 4> kSimple = {
    {{"relu", c10::aten::relu}, {"sigmoid", c10::aten::sigmoid}, {"silu", c10::aten::silu}, {"tanh", c10::aten::tanh}}};

}  // namespace

std::string activation_name(const Node* node) {
  for (const auto& [name, kind] : kSimple) {
    if (node->kind() == kind && node->inputs().size() == 1) {
      return name;
    }
  }
  if (node->kind() != c10::aten::gelu || node->inputs().size() != 2) {
    return "";
  }
  const auto approximate = torch::jit::toIValue(node->namedInput("approximate"));
  if (!approximate || !approximate->isString()) {
    return "";
  }
  const std::string& how = approximate->toStringRef();
  return how == "none" ? "gelu" : how == "tanh" ? "gelu_pytorch_tanh" : "";
}

Value* insert_activation(Graph& graph, Value* input, const std::string& name) {
  if (name == "linear") {
    return input;
  }
  for (const auto& [simple, kind] : kSimple) {
    if (name == simple) {
      return graph.insert(kind, {input});
    }
  }
  if (name == "gelu" || name == "gelu_pytorch_tanh") {
    return graph.insert(c10::aten::gelu, {input}, {{"approximate", name == "gelu" ? "none" : "tanh"}});
  }
  find_activation(name, "linear");  // an error names those that there are
  const std::string source = "def activation(inner: Tensor) -> Tensor:\n    return " + activation_source(name) + "\n";
  return torch::jit::insertGraph(graph, *compile_graph(source, "activation"), {input})[0];
}

}  // namespace torchgraft
