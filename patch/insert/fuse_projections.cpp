#include <torchgraft/patch/insert/fuse_projections.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr size_t kX = 0;
constexpr size_t kBase = 1;  // the operand that the op adds its result to, in both ops

// An adapter op, the op that it becomes with a linear map, and whether the linear map must read the op's x.
struct Fusion {
  c10::Symbol op;
  c10::Symbol fused;
  bool reads_same_x;
};

const Fusion* fusion_of(const Node* node) {
  static const std::vector<Fusion> kFusions = {
      {c10::Symbol::fromQualString("torchgraft::gated_lora"),
       c10::Symbol::fromQualString("torchgraft::gated_lora_linear"), true},
      {c10::Symbol::fromQualString("torchgraft::gated_bottleneck"),
       c10::Symbol::fromQualString("torchgraft::gated_bottleneck_linear"), false}};
  const auto found = std::find_if(kFusions.begin(), kFusions.end(),
                                  [node](const Fusion& fusion) { return fusion.op == node->kind(); });
  return found == kFusions.end() ? nullptr : &*found;
}

bool is_used_once(const Node* node) { return node->outputs().size() == 1 && node->output()->uses().size() == 1; }

// Whether `node` is dropout that was traced in eval mode.
bool does_nothing(const Node* node) {
  if (!is_aten(node, {"dropout"})) {
    return false;
  }
  const auto train = torch::jit::toIValue(node->namedInput("train"));
  return train && train->isBool() && !train->toBool();
}

// Whether no node between the two writes into a tensor. A fused op runs the linear map at `last`: its inputs must not
// have changed by then.
bool nothing_writes_between(const Node* first, const Node* last) {
  for (const Node* node = first->next(); node != last; node = node->next()) {
    const auto* schema = node->maybeSchema();
    const bool writes = !node->blocks().empty() || (schema && schema->is_mutable());
    if (writes) {
      return false;
    }
  }
  return true;
}

// An adapter op and the linear map whose result it updates. Nothing else reads that result.
struct Pair {
  Node* op = nullptr;
  const Fusion* fusion = nullptr;
  std::vector<Node*> between;  // nodes that do nothing, from the op to the linear map
  Node* linear = nullptr;      // null when there is none
};

Pair pair_of(Node* op, const Fusion* fusion) {
  Pair pair{op, fusion, {}, nullptr};
  Node* base = op->input(kBase)->node();
  while (does_nothing(base) && is_used_once(base)) {
    pair.between.push_back(base);
    base = base->input(0)->node();
  }
  const bool is_own = is_aten(base, {"linear"}) && is_used_once(base) && base->owningBlock() == op->owningBlock() &&
                      (!fusion->reads_same_x || base->namedInput("input") == op->input(kX));
  if (is_own && nothing_writes_between(base, op)) {
    pair.linear = base;
  }
  return pair;
}

Node* create_fused(Graph& graph, const Pair& pair) {
  std::vector<Value*> inputs;  // x, (input,) weight, bias, and what follows the base
  if (!pair.fusion->reads_same_x) {
    inputs.push_back(pair.op->input(kX));
  }
  inputs.insert(inputs.end(), pair.linear->inputs().begin(), pair.linear->inputs().end());
  inputs.insert(inputs.end(), pair.op->inputs().begin() + kBase + 1, pair.op->inputs().end());
  return graph.create(pair.fusion->fused, inputs, pair.op->outputs().size());
}

}  // namespace

size_t fuse_projections(const std::shared_ptr<Graph>& graph) {
  std::vector<Pair> pairs;
  for_each_node(graph->block(), [&](Node* node) {
    if (const Fusion* fusion = fusion_of(node)) {
      Pair pair = pair_of(node, fusion);
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
