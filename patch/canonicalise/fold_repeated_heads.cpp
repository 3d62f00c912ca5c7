#include <torchgraft/patch/canonicalise/fold_repeated_heads.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

constexpr int64_t kHeads = 1;  // the dimension of the heads in [batch, heads, tokens, head size]

Value* without_contiguous(Value* value) {
  while (is_aten(value->node(), {"contiguous", "clone"})) {
    value = value->node()->namedInput("self");
  }
  return value;
}

// The value [B, kv, S, d] whose heads `heads` repeats, each several times in a row; null when there is none.
Value* before_repetition(Value* heads, SymbolicShapes& shapes) {
  heads = without_contiguous(heads);
  Node* node = heads->node();
  if (is_aten(node, {"repeat_interleave"}) && node->inputs().size() > 2) {
    if (is_tensor(node->namedInput("repeats"))) {  // a number for each head
      return nullptr;
    }
    const auto shape = shapes.shape(node->namedInput("self"));
    const bool along_heads = shape && shape->size() == 4 && constant_int(node->namedInput("dim")) == kHeads;
    return along_heads ? node->namedInput("self") : nullptr;
  }
  if (!is_aten(node, {"reshape", "view", "flatten", "_unsafe_view"})) {
    return nullptr;
  }
  Node* expand = without_contiguous(node->namedInput("self"))->node();
  if (!is_aten(expand, {"expand"})) {
    return nullptr;
  }
  Value* inserted = expand->namedInput("self");
  // x[:, :, None, :, :] as a trace records it
  while (is_aten(inserted->node(), {"slice"}) &&
         shapes.shape(inserted) == shapes.shape(inserted->node()->namedInput("self"))) {
    inserted = inserted->node()->namedInput("self");
  }
  if (!is_aten(inserted->node(), {"unsqueeze"}) || constant_int(inserted->node()->namedInput("dim")) != kHeads + 1) {
    return nullptr;
  }
  Value* source = inserted->node()->namedInput("self");
  while (is_aten(source->node(), {"slice"}) &&
         shapes.shape(source) == shapes.shape(source->node()->namedInput("self"))) {
    source = source->node()->namedInput("self");
  }
  const auto before = shapes.shape(source);
  const auto after = shapes.shape(heads);
  const bool only_heads_grow = before && after && before->size() == 4 && after->size() == 4 &&
                               (*before)[1].is_constant() && (*after)[1].is_constant() && (*before)[2] == (*after)[2] &&
                               (*before)[3] == (*after)[3] && (*after)[1].factor % (*before)[1].factor == 0;
  return only_heads_grow ? source : nullptr;
}

// Whether one head of keys and values is broadcast to several of queries (Falcon).
bool is_one_for_all(Node* attention, SymbolicShapes& shapes) {
  const auto heads = [&](const char* input) {
    const auto shape = shapes.shape(attention->namedInput(input));
    return shape && shape->size() == 4 && (*shape)[kHeads].is_constant() ? (*shape)[kHeads].factor : 0;
  };
  return heads("query") > 1 && heads("key") == 1 && heads("value") == 1;
}

// Whether something may write into `heads` before `attention` reads them, as it did not read them so far: it read
// `repeated`, for which they were copied.
bool may_change(const Writes& writes, const Value* heads, Value* repeated, const Node* attention) {
  const Node* copied = without_contiguous(repeated)->node();
  const bool in_one_block = copied->owningBlock() == attention->owningBlock();
  return in_one_block ? writes.between(copied, attention, {heads}) != nullptr : writes.reach(heads);
}

}  // namespace

void fold_repeated_heads(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module) {
  SymbolicShapes shapes(module);
  const Writes writes(graph);
  for_each_node(graph->block(), [&](Node* node) {
    if (!is_aten(node, {"scaled_dot_product_attention"})) {
      return;
    }
    for (size_t i : {0, 1, 2}) {  // shapes flow from the projections
      for (Node* linear : nearest_linears(node->input(i))) {
        shapes.shape(linear->output());
      }
    }
    const size_t gqa = node->inputs().size() - 1;
    TORCH_INTERNAL_ASSERT(node->schema().arguments().at(gqa).name() == "enable_gqa",
                          "enable_gqa is not the last argument of ", node->schema());
    torch::jit::WithInsertPoint guard(node);
    if (is_one_for_all(node, shapes)) {
      node->replaceInput(gqa, graph->insertConstant(true));
      return;
    }
    Value* key = before_repetition(node->namedInput("key"), shapes);
    Value* value = before_repetition(node->namedInput("value"), shapes);
    if (!key || !value || may_change(writes, key, node->namedInput("key"), node) ||
        may_change(writes, value, node->namedInput("value"), node)) {
      return;
    }
    if (shapes.shape(key)->at(kHeads) != shapes.shape(value)->at(kHeads)) {
      return;
    }
    node->replaceInput(1, key);
    node->replaceInput(2, value);
    node->replaceInput(gqa, graph->insertConstant(true));
  });
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
