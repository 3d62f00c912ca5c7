#include <torchgraft/patch/canonicalise/select_parts.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

class PartSelector {
 public:
  PartSelector(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module)
      : graph_(*graph), shapes_(module), writes_(graph) {}

  // whole[..., index] along `dim`, inserted without the other parts; null when it has none of its own.
  Value* part(Value* whole, int64_t dim, int64_t index);

 private:
  Value* part_of_join(Node* join, size_t dim, int64_t index);

  Graph& graph_;
  SymbolicShapes shapes_;
  Writes writes_;
};

Value* PartSelector::part(Value* whole, int64_t dim, int64_t index) {
  const auto shape = shapes_.shape(whole);
  const auto parts = joined_tensors(whole->node());
  if (!shape || parts.empty() || writes_.reach(whole)) {
    return nullptr;
  }
  const auto rank = static_cast<int64_t>(shape->size());
  dim = dim < 0 ? dim + rank : dim;
  const auto along = position(whole->node()->namedInput("dim"), shape->size());
  if (!along || dim < 0 || dim >= rank) {
    return nullptr;
  }
  if (!is_aten(whole->node(), {"stack"})) {
    return static_cast<int64_t>(*along) != dim ? part_of_join(whole->node(), dim, index) : nullptr;
  }
  const auto count = static_cast<int64_t>(parts.size());
  index = index < 0 ? index + count : index;
  const bool is_one = static_cast<int64_t>(*along) == dim && index >= 0 && index < count;
  return is_one && !writes_.reach(parts[index]) ? parts[index] : nullptr;
}

Value* PartSelector::part_of_join(Node* join, size_t dim, int64_t index) {
  const auto rank = shapes_.shape(join->output())->size();
  const size_t along = *position(join->namedInput("dim"), rank);
  std::vector<Value*> parts;
  bool has_own = false;
  for (Value* joined_part : joined_tensors(join)) {
    const auto shape = shapes_.shape(joined_part);
    if (!shape || shape->size() != rank) {  // torch.cat skips tensors of shape [0]
      return nullptr;
    }
    Value* own = part(joined_part, static_cast<int64_t>(dim), index);
    has_own = has_own || own;
    parts.push_back(own ? own : graph_.insert(c10::aten::select, {joined_part, static_cast<int64_t>(dim), index}));
  }
  if (!has_own) {
    return nullptr;
  }
  Value* list = graph_.insertNode(graph_.createList(c10::TensorType::get(), parts))->output();
  return graph_.insert(c10::aten::cat, {list, static_cast<int64_t>(along > dim ? along - 1 : along)});
}

}  // namespace

void select_parts(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module) {
  struct Selection {
    Value* result;
    Value* whole;
    int64_t dim;
    int64_t index;
  };
  std::vector<Selection> selections;
  for_each_node(graph->block(), [&](Node* node) {
    if (!is_aten(node, {"select", "unbind"}) || !is_tensor(node->input(0))) {
      return;
    }
    const auto dim = constant_int(node->namedInput("dim"));
    if (!dim) {
      return;
    }
    if (is_aten(node, {"select"})) {
      if (const auto index = constant_int(node->namedInput("index"))) {
        selections.push_back({node->output(), node->namedInput("self"), *dim, *index});
      }
      return;
    }
    for (const torch::jit::Use& use : node->output()->uses()) {
      for (size_t i = 0; use.user->kind() == c10::prim::ListUnpack && i < use.user->outputs().size(); ++i) {
        selections.push_back({use.user->output(i), node->namedInput("self"), *dim, static_cast<int64_t>(i)});
      }
    }
  });
  if (selections.empty()) {
    return;
  }
  PartSelector selector(graph, module);
  for (const Selection& selection : selections) {
    torch::jit::WithInsertPoint guard(selection.result->node());
    if (Value* part = selector.part(selection.whole, selection.dim, selection.index)) {
      selection.result->replaceAllUsesWith(part);
    }
  }
}

}  // namespace torchgraft
