#include <torchgraft/patch/passes/fuse_projections.h>

#include <torchgraft/patch/graph_utils.h>

#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr size_t kX = 0;
constexpr size_t kBase = 1;

// The linear map that `lora` updates, when nothing else sees its result.
Node* fusable_linear(const Node* lora) {
  Node* linear = lora->input(kBase)->node();
  const bool is_own = is_aten(linear, {"linear"}) && linear->output()->uses().size() == 1 &&
                      linear->input(0) == lora->input(kX) && linear->owningBlock() == lora->owningBlock();
  return is_own ? linear : nullptr;
}

}  // namespace

size_t fuse_projections(const std::shared_ptr<Graph>& graph) {
  static const auto kLora = c10::Symbol::fromQualString("torchgraft::gated_lora");
  static const auto kFused = c10::Symbol::fromQualString("torchgraft::gated_lora_linear");
  std::vector<std::pair<Node*, Node*>> pairs;
  for_each_node(graph->block(), [&](Node* node) {
    Node* linear = node->kind() == kLora ? fusable_linear(node) : nullptr;
    if (linear) {
      pairs.emplace_back(node, linear);
    }
  });
  for (const auto& [lora, linear] : pairs) {
    // x, weight, bias; then lora_a and what follows it
    std::vector<Value*> inputs(linear->inputs().begin(), linear->inputs().end());
    inputs.insert(inputs.end(), lora->inputs().begin() + kBase + 1, lora->inputs().end());
    Node* fused = graph->create(kFused, inputs, lora->outputs().size())->insertBefore(lora);
    fused->copyMetadata(lora);
    for (size_t i = 0; i < lora->outputs().size(); ++i) {
      fused->output(i)->copyMetadata(lora->output(i));
      lora->output(i)->replaceAllUsesWith(fused->output(i));
    }
    lora->destroy();
    linear->destroy();
  }
  return pairs.size();
}

}  // namespace torchgraft
