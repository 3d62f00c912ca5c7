#include <torchgraft/patch/graph/hoist.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>

#include <algorithm>
#include <functional>
#include <iterator>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

// Values that `node` reads, those of its sub-blocks included.
void collect_inputs(Node* node, std::vector<Value*>& result) {
  result.insert(result.end(), node->inputs().begin(), node->inputs().end());
  for (Block* block : node->blocks()) {
    for (Node* inner : block->nodes()) {
      collect_inputs(inner, result);
    }
    result.insert(result.end(), block->outputs().begin(), block->outputs().end());
  }
}

bool is_made_inside(const Value* value, const Node* node) {
  for (const Block* block = value->node()->owningBlock(); block;) {
    const Node* owner = block->owningNode();
    if (owner == node) {
      return true;
    }
    block = owner ? owner->owningBlock() : nullptr;
  }
  return false;
}

// Whether `value` exists before `point`.
bool is_there(const Value* value, const Node* point) {
  return value->node()->kind() == c10::prim::Param || value->node()->isBefore(point);
}

bool is_metadata(const Node* node) {
  return node->kind() == c10::prim::dtype || node->kind() == c10::prim::device ||
         (is_aten(node, {"size"}) && node->inputs().size() == 2);
}

// Hands every size, dtype and device that the branches of `node` read from tensors behind `point` to
// `replace_metadata`.
void replace_inner_metadata(Node* node, Node* point, const std::function<bool(Node*)>& replace_metadata) {
  for (Block* block : node->blocks()) {
    for_each_node(block, [&](Node* inner) {
      const bool is_later = is_metadata(inner) && !is_made_inside(inner->input(0), node) &&
                            inner->input(0)->node()->kind() != c10::prim::Param &&
                            !inner->input(0)->node()->isBefore(point);
      if (is_later && replace_metadata(inner)) {
        inner->destroy();
      }
    });
  }
}

// Moves `value`, and all that it is computed from, to before `point`. `replace_metadata` returns true when it has
// replaced a size, dtype or device, whose node then stays.
bool move_before(Value* value, Node* point, const std::function<bool(Node*)>& replace_metadata) {
  Node* node = value->node();
  if (is_there(value, point)) {
    return true;
  }
  if (is_metadata(node) && replace_metadata(node)) {
    return true;
  }
  if (node == point || node->owningBlock() != point->owningBlock() || node->hasSideEffects()) {
    return false;
  }
  // Nothing that depends on the contents of a projection or an attention can be known before it.
  if (is_linear(node) || is_aten(node, {"scaled_dot_product_attention"})) {
    return false;
  }
  replace_inner_metadata(node, point, replace_metadata);
  std::vector<Value*> inputs;
  collect_inputs(node, inputs);
  for (Value* input : inputs) {
    if (!is_made_inside(input, node) && !move_before(input, point, replace_metadata)) {
      return false;
    }
  }
  node->moveBefore(point);
  return true;
}

// The values that `value` is computed from, itself included, back to those that are there before `point`. Without such
// of which only the size, the dtype or the device is read: no write changes it.
torch::jit::ValueSet computed_from(Value* value, const Node* point) {
  torch::jit::ValueSet values;
  std::vector<Value*> frontier = {value};
  while (!frontier.empty()) {
    Value* next = frontier.back();
    frontier.pop_back();
    if (!values.insert(next).second || is_there(next, point)) {
      continue;
    }
    std::vector<Value*> inputs;
    collect_inputs(next->node(), inputs);
    std::copy_if(inputs.begin(), inputs.end(), std::back_inserter(frontier),
                 [&](const Value* input) { return !is_metadata(next->node()) || !is_there(input, point); });
  }
  return values;
}

// Whether a node writes in place into a value that `value` is computed from: moving `value` would leave the write
// behind.
bool is_written_behind(Value* value, Node* point) {
  const bool moves = !is_there(value, point) && value->node()->owningBlock() == point->owningBlock();
  return moves &&
         Writes(point->owningGraph()->shared_from_this()).between(point, value->node(), computed_from(value, point));
}

}  // namespace

Value* Hoist::size_before(Value* tensor, size_t dim, Node* point, Value* anchor) {
  torch::jit::Graph* graph = point->owningGraph();
  const auto shape = shapes_.shape(tensor);
  const auto anchor_shape = shapes_.shape(anchor);
  if (is_there(tensor, point)) {
    return graph->insert(c10::aten::size, {tensor, static_cast<int64_t>(dim)});
  }
  if (!shape || !anchor_shape || dim >= shape->size()) {
    return nullptr;
  }
  if ((*shape)[dim].is_constant()) {
    return graph->insertConstant((*shape)[dim].factor);
  }
  const auto same = std::find(anchor_shape->begin(), anchor_shape->end(), (*shape)[dim]);
  if (same != anchor_shape->end()) {
    return graph->insert(c10::aten::size, {anchor, static_cast<int64_t>(same - anchor_shape->begin())});
  }
  // The tokens of earlier passes and those of this one, perhaps rearranged.
  Node* join = tensor->node();
  const auto source = join->inputs().empty() ? std::nullopt : shapes_.shape(join->input(0));
  const size_t at = source ? std::find(source->begin(), source->end(), (*shape)[dim]) - source->begin() : 0;
  if (source && at < source->size()) {
    return size_before(join->input(0), at, point, anchor);
  }
  const bool joins = is_aten(join, {"cat", "concat"}) && position(join->namedInput("dim"), shape->size()) == dim;
  Value* total = nullptr;
  for (Value* part : joins ? joined_tensors(join) : at::ArrayRef<Value*>()) {
    if (shapes_.shape(part) == Shape{number(0)}) {  // torch.cat skips it
      continue;
    }
    Value* size = size_before(part, dim, point, anchor);
    if (!size) {
      return nullptr;
    }
    total = total ? graph->insert(c10::aten::add, {total, size}) : size;
  }
  return total;
}

bool Hoist::read_from_anchor(Node* metadata, Node* point, Value* anchor) {
  torch::jit::Graph* graph = metadata->owningGraph();
  torch::jit::WithInsertPoint guard(point);
  Value* replacement = nullptr;
  if (is_aten(metadata, {"size"})) {
    const auto shape = shapes_.shape(metadata->namedInput("self"));
    const auto dim = shape ? position(metadata->namedInput("dim"), shape->size()) : std::nullopt;
    replacement = dim ? size_before(metadata->namedInput("self"), *dim, point, anchor) : nullptr;
  } else {
    replacement = graph->insert(metadata->kind(), {anchor});
  }
  if (replacement) {
    metadata->output()->replaceAllUsesWith(replacement);
  }
  return replacement != nullptr;
}

bool Hoist::operator()(Value* value, Node* point, Value* anchor) {
  return !is_written_behind(value, point) &&
         move_before(value, point, [&](Node* metadata) { return read_from_anchor(metadata, point, anchor); });
}

bool Hoist::move(Value* value, Node* point) {
  return move_before(value, point, [](Node*) { return false; });
}

}  // namespace torchgraft
