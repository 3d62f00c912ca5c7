#include <torchgraft/patch/canonicalise/collect_appends.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <algorithm>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Use;

bool appends_to(const Use& use, const Node* list) {
  return use.user->kind() == c10::aten::append && use.offset == 0 && use.user->owningBlock() == list->owningBlock() &&
         std::all_of(use.user->outputs().begin(), use.user->outputs().end(),
                     [](const torch::jit::Value* output) { return output->uses().empty(); });
}

// The nodes that append to `list` in its block, in execution order; empty when something reads it before the last.
std::vector<Node*> all_appends(const Node* list) {
  std::vector<Node*> result;
  const auto& uses = list->output()->uses();
  for (const Use& use : uses) {
    if (appends_to(use, list)) {
      result.push_back(use.user);
    }
  }
  std::sort(result.begin(), result.end(), [](const Node* a, const Node* b) { return a->isBefore(b); });
  const bool is_read_last = std::all_of(uses.begin(), uses.end(), [&](const Use& use) {
    const bool is_return = use.user->kind() == c10::prim::Return;
    return appends_to(use, list) || result.empty() ||
           (is_return ? use.user->owningBlock() == list->owningBlock() : use.user->isAfter(result.back()));
  });
  return is_read_last ? result : std::vector<Node*>();
}

}  // namespace

void collect_appends(const std::shared_ptr<Graph>& graph) {
  std::vector<Node*> lists;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == c10::prim::ListConstruct) {
      lists.push_back(node);
    }
  });
  for (Node* list : lists) {
    const std::vector<Node*> appends = all_appends(list);
    if (appends.empty()) {
      continue;
    }
    Node* whole = graph->create(c10::prim::ListConstruct, list->inputs(), 1)->insertBefore(appends.back());
    whole->output()->copyMetadata(list->output());
    for (Node* append : appends) {
      whole->addInput(append->namedInput("el"));
      append->destroy();
    }
    replace_node(list, {whole->output()});
  }
}

}  // namespace torchgraft
