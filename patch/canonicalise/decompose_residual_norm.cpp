#include <torchgraft/patch/canonicalise/decompose_residual_norm.h>

#include <torchgraft/patch/graph/graph_utils.h>

namespace torchgraft {

using torch::jit::Node;

void decompose_residual_norm(const std::shared_ptr<torch::jit::Graph>& graph) {
  static const auto kResidualNorm = c10::Symbol::fromQualString("torchgraft::residual_norm");
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() != kResidualNorm) {
      return;
    }
    const torch::jit::WithInsertPoint guard(node);
    torch::jit::Value* sum = graph->insert(c10::aten::add, {node->namedInput("x"), node->namedInput("residual")});
    torch::jit::Value* output =
        graph->insert(c10::aten::layer_norm, {sum, node->namedInput("normalized_shape"), node->namedInput("weight"),
                                              node->namedInput("bias"), node->namedInput("eps")});
    sum->node()->copyMetadata(node);
    output->node()->copyMetadata(node);
    replace_node(node, {output, sum});
  });
}

}  // namespace torchgraft
