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
constexpr size_t kBase = 1;  // what the op adds its result to: the second argument of both

bool is_used_once(const Node* node) { return node->outputs().size() == 1 && node->output()->uses().size() == 1; }

// Dropout that was traced in eval mode.
bool does_nothing(const Node* node) {
  if (!is_aten(node, {"dropout"})) {
    return false;
  }
  const auto train = torch::jit::toIValue(node->namedInput("train"));
  return train && train->isBool() && !train->toBool();
}

// An op and the linear map whose result it updates, which nothing else sees.
struct Pair {
  Node* op = nullptr;
  bool is_lora = false;
  std::vector<Node*> between;  // from the op to the linear map: what does nothing
  Node* linear = nullptr;      // null: there is none
};

Pair pair_of(Node* op, bool is_lora) {
  Pair pair{op, is_lora, {}, nullptr};
  Node* base = op->input(kBase)->node();
  while (does_nothing(base) && is_used_once(base)) {
    pair.between.push_back(base);
    base = base->input(0)->node();
  }
  const bool is_own =
      is_aten(base, {"linear"}) && is_used_once(base) && base->owningBlock() == op->owningBlock();
  if (is_own && (!is_lora || base->input(0) == op->input(kX))) {
    pair.linear = base;
  }
  return pair;
}

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
    if (is_lora || node->kind() == kBottleneck) {
      Pair pair = pair_of(node, is_lora);
      if (pair.linear) {
        pairs.push_back(std::move(pair));
      }
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
    for (Node* node : pair.between) {
      node->destroy();
    }
    pair.linear->destroy();
  }
  return pairs.size();
}

}  // namespace torchgraft
