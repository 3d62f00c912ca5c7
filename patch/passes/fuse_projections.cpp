#include <torchgraft/patch/passes/fuse_projections.h>

#include <torchgraft/patch/graph_utils.h>

#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr size_t kX = 0;
constexpr size_t kBase = 1;  // what the op adds its result to: the second argument of both

// The linear map whose result `op` updates, when nothing else sees it.
Node* own_linear(const Node* op) {
  Node* linear = op->input(kBase)->node();
  const bool is_own = is_aten(linear, {"linear"}) && linear->output()->uses().size() == 1 &&
                      linear->owningBlock() == op->owningBlock();
  return is_own ? linear : nullptr;
}

struct Pair {
  Node* op;
  Node* linear;
  bool is_lora;
};

Node* create_fused(Graph& graph, const Pair& pair) {
  static const auto kLoraLinear = c10::Symbol::fromQualString("torchgraft::gated_lora_linear");
  static const auto kBottleneckLinear = c10::Symbol::fromQualString("torchgraft::gated_bottleneck_linear");
  std::vector<Value*> inputs;  // x, (input,) weight, bias, and what follows the base
  if (!pair.is_lora) {
    inputs.push_back(pair.op->input(kX));
  }
  inputs.insert(inputs.end(), pair.linear->inputs().begin(), pair.linear->inputs().end());
  inputs.insert(inputs.end(), pair.op->inputs().begin() + kBase + 1, pair.op->inputs().end());
  return graph.create(pair.is_lora ? kLoraLinear : kBottleneckLinear, inputs, pair.op->outputs().size());
}

}  // namespace

size_t fuse_projections(const std::shared_ptr<Graph>& graph) {
  static const auto kLora = c10::Symbol::fromQualString("torchgraft::gated_lora");
  static const auto kBottleneck = c10::Symbol::fromQualString("torchgraft::gated_bottleneck");
  std::vector<Pair> pairs;
  for_each_node(graph->block(), [&](Node* node) {
    const bool is_lora = node->kind() == kLora;
    Node* linear = is_lora || node->kind() == kBottleneck ? own_linear(node) : nullptr;
    if (linear && (!is_lora || linear->input(0) == node->input(kX))) {
      pairs.push_back({node, linear, is_lora});
    }
  });
  for (const Pair& pair : pairs) {
    Node* fused = create_fused(*graph, pair)->insertBefore(pair.op);
    fused->copyMetadata(pair.op);
    for (size_t i = 0; i < pair.op->outputs().size(); ++i) {
      fused->output(i)->copyMetadata(pair.op->output(i));
      pair.op->output(i)->replaceAllUsesWith(fused->output(i));
    }
    pair.op->destroy();
    pair.linear->destroy();
  }
  return pairs.size();
}

}  // namespace torchgraft
