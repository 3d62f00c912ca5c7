#include <torchgraft/patch/canonicalise/decompose_linear_relu.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <string>

namespace torchgraft {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

void decompose_linear_relu(const std::shared_ptr<Graph>& graph) {
  for_each_node(graph->block(), [&](Node* node) {
    const std::string kind = node->kind().toQualString();
    if (kind != "quantized::linear_relu_dynamic" && kind != "quantized::linear_relu_dynamic_fp16") {
      return;
    }
    const bool is_int8 = kind == "quantized::linear_relu_dynamic";
    const auto linear =
        c10::Symbol::fromQualString(is_int8 ? "quantized::linear_dynamic" : "quantized::linear_dynamic_fp16");
    torch::jit::WithInsertPoint guard(node);
    Value* product = graph->insertNode(graph->create(linear, node->inputs(), 1)->copyMetadata(node))->output();
    replace_node(node, {graph->insert(c10::aten::relu, {product})});
  });
}

}  // namespace torchgraft
