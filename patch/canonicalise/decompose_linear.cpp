#include <torchgraft/patch/canonicalise/decompose_linear.h>

#include <torchgraft/patch/graph/activation_node.h>
#include <torchgraft/patch/graph/graph_utils.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

void decompose_linear(const std::shared_ptr<torch::jit::Graph>& graph) {
  static const auto kLinear = c10::Symbol::fromQualString("torchgraft::linear");
  for_each_node(graph->block(), [&](Node* node) {
    const auto name = node->kind() == kLinear ? torch::jit::toIValue(node->namedInput("non_linearity")) : std::nullopt;
    if (!name || !name->isString()) {
      return;
    }
    const torch::jit::WithInsertPoint guard(node);
    const auto operands = {node->namedInput("x"), node->namedInput("weight"), node->namedInput("bias")};
    Node* linear = graph->create(c10::aten::linear, operands, 1);
    linear->insertBefore(node)->copyMetadata(node);
    Value* result = insert_activation(*graph, linear->output(), name->toStringRef());
    result->node()->copyMetadata(node);
    replace_node(node, {result});
  });
}

}  // namespace torchgraft
