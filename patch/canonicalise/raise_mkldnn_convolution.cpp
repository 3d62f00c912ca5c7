#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/ir/constants.h>

#include <string>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool is_prim(const Node* node, const char* name) { return node->kind().toQualString() == std::string("prim::") + name; }

Value* insert_convolution(Graph& graph, Node* node) {
  Value* transposed = graph.insertConstant(false);
  Value* output_padding = graph.insertConstant(std::vector<int64_t>{0, 0});
  return graph.insert(c10::aten::convolution,
                      {node->namedInput("input"), node->namedInput("weight"), node->namedInput("bias"),
                       node->namedInput("stride"), node->namedInput("padding"), node->namedInput("dilation"),
                       transposed, output_padding, node->namedInput("groups")});
}

// Inserts what `node` computes, without oneDNN's layout; null for a node that does not use that layout.
Value* insert_dense(Graph& graph, Node* node) {
  if (is_aten(node, {"to_mkldnn", "to_dense"})) {
    return node->namedInput("self");
  }
  if (is_prim(node, "ConstantMKLDNNTensor")) {
    return graph.insertConstant(node->t(c10::attr::value).to_dense());
  }
  if (is_prim(node, "mkldnn_convolution")) {
    return insert_convolution(graph, node);
  }
  const std::string name = node->kind().toQualString();
  const bool is_other = name.rfind("prim::MKLDNN", 0) == 0 || name.rfind("prim::mkldnn", 0) == 0 ||
                        name == "prim::BroadcastMKLDNNTensors";
  TORCH_CHECK(!is_other, "graft: the module holds ", name,
              ", an op of torch.jit.optimize_for_inference that torch cannot save; graft the module first and optimize "
              "the result");
  return nullptr;
}

}  // namespace

void raise_mkldnn_convolution(const std::shared_ptr<Graph>& graph) {
  for_each_node(graph->block(), [&](Node* node) {
    torch::jit::WithInsertPoint guard(node);
    if (Value* dense = insert_dense(*graph, node)) {
      node->output()->replaceAllUsesWith(dense);
      node->destroy();
    }
  });
}

}  // namespace torchgraft
