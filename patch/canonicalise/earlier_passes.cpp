#include <torchgraft/patch/canonicalise/earlier_passes.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <algorithm>
#include <unordered_set>
#include <utility>
#include <vector>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

namespace {

bool moves_elements_only(const Node* node) {
  const auto kind = node->kind();
  const bool takes_apart = kind == c10::prim::TupleUnpack || kind == c10::prim::TupleIndex ||
                           kind == c10::prim::ListUnpack || kind == c10::prim::ListConstruct ||
                           kind == c10::prim::unchecked_cast || kind == c10::aten::__getitem__;
  return takes_apart || is_layout(node) ||
         is_aten(node, {"cat", "concat", "select", "slice", "narrow", "index_select", "expand", "repeat_interleave",
                        "unbind", "chunk", "split", "split_with_sizes"});
}

bool is_number_or_text(const Value* value) {
  const auto kind = value->type()->kind();
  return kind == c10::TypeKind::IntType || kind == c10::TypeKind::BoolType || kind == c10::TypeKind::StringType ||
         kind == c10::TypeKind::NoneType || value->type()->isSubtypeOf(*c10::ListType::ofInts());
}

bool is_container(const Value* value) {
  return value->type()->kind() == c10::TypeKind::ListType || value->type()->kind() == c10::TypeKind::DictType;
}

// Whether the graph puts anything into a list or a dict that it was given: an element of one may be newer than it
// seems.
bool fills_containers(torch::jit::Graph& graph) {
  bool result = false;
  for_each_node(graph.block(), [&](const Node* node) { result = result || changes_given_container(node); });
  return result;
}

// `value` and all that it was made of, if these are elements of forward's arguments, moved about only; else none.
std::vector<Value*> moved_arguments(Value* value) {
  bool reaches_arguments = false;
  std::unordered_set<const Value*> seen = {value};
  std::vector<Value*> frontier = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (is_container(frontier[i]) && node->kind() != c10::prim::ListConstruct &&
        fills_containers(*frontier[i]->owningGraph())) {
      return {};
    }
    if (node->kind() == c10::prim::Param) {
      const bool is_argument = node == frontier[i]->owningGraph()->param_node() && frontier[i]->offset() > 0;
      reaches_arguments = reaches_arguments || is_argument;
      if (!is_argument) {
        return {};
      }
    } else if (node->kind() == c10::prim::Constant) {
      continue;
    } else if (!moves_elements_only(node)) {
      return {};
    } else {
      const bool shaped_like = is_aten(node, {"type_as"});
      for (Value* input : shaped_like ? node->inputs().slice(0, 1) : node->inputs()) {
        if (!is_number_or_text(input) && seen.insert(input).second) {
          frontier.push_back(input);
        }
      }
    }
  }
  return reaches_arguments ? frontier : std::vector<Value*>();
}

}  // namespace

bool is_of_earlier_passes(Value* value) { return !moved_arguments(value).empty(); }

bool are_written_since(std::initializer_list<Value*> values) {
  const Writes writes((*values.begin())->owningGraph()->shared_from_this());
  return std::any_of(values.begin(), values.end(), [&](Value* value) {
    const std::vector<Value*> moved = moved_arguments(value);
    return std::any_of(moved.begin(), moved.end(), [&](const Value* part) { return writes.reach(part); });
  });
}

void assume_heads(Value* heads, const std::optional<Shape>& query, bool is_transposed, SymbolicShapes& shapes) {
  if (!query || query->size() != 4 || !is_of_earlier_passes(heads)) {
    return;
  }
  Shape assumed = {(*query)[0], (*query)[1], shapes.fresh(), (*query)[3]};
  if (is_transposed) {
    std::swap(assumed[2], assumed[3]);
  }
  shapes.assume(heads, assumed);
}

}  // namespace torchgraft
