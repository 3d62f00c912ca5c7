#include <torchgraft/patch/canonicalise/raise_softmax.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <optional>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// The one dimension that `node` (sum, amax) reduces; nullopt when it does not keep it.
std::optional<int64_t> kept_dimension(const Node* node) {
  const auto keeps = resolve_constant(node->namedInput("keepdim"));
  const auto dims = resolve_constant(node->namedInput("dim"));
  const Node* list = node->namedInput("dim")->node();
  if (!keeps || !keeps->isBool() || !keeps->toBool()) {
    return std::nullopt;
  }
  if (dims && dims->isIntList() && dims->toIntVector().size() == 1) {
    return dims->toIntVector().front();
  }
  if (dims && dims->isInt()) {  // of max
    return dims->toInt();
  }
  return list->kind() == c10::prim::ListConstruct && list->inputs().size() == 1 ? constant_int(list->inputs()[0])
                                                                                : std::nullopt;
}

Value* attached(Value* value) {
  while (is_aten(value->node(), {"detach"})) {
    value = value->node()->namedInput("self");
  }
  return value;
}

// x where `value` is x minus the largest number of x over `dim`, which softmax over `dim` does not see; else `value`.
Value* before_shift(Value* value, int64_t dim) {
  Node* shift = value->node();
  if (!is_aten(shift, {"sub"}) || !has_unit_alpha(shift) || !is_tensor(shift->namedInput("other"))) {
    return value;
  }
  Value* x = shift->namedInput("self");
  Value* largest = attached(shift->namedInput("other"));
  const bool is_largest =
      is_aten(largest->node(), {"amax"}) ||
      (is_aten(largest->node(), {"max"}) && largest->node()->outputs().size() == 2 && largest->offset() == 0);
  const bool fits = is_largest && attached(largest->node()->namedInput("self")) == attached(x) &&
                    kept_dimension(largest->node()) == dim;
  return fits ? x : value;
}

struct Softmax {
  Value* x = nullptr;
  Value* dim = nullptr;
  Value* dtype = nullptr;            // null: that of x
  std::vector<const Value*> passed;  // that the new node no longer reads
};

// What `node` spells; nullopt when it is no softmax.
std::optional<Softmax> spelled(Graph& graph, Node* node) {
  if (is_aten(node, {"exp"}) && is_aten(node->input()->node(), {"log_softmax"})) {
    Node* log = node->input()->node();
    return Softmax{log->namedInput("self"), log->namedInput("dim"), log->namedInput("dtype"), {log->output()}};
  }
  const bool divides = is_aten(node, {"div"}) && node->inputs().size() == 2 && is_tensor(node->output());
  if (divides && is_tensor(node->namedInput("other"))) {
    Value* e = node->namedInput("self");
    Node* sum = node->namedInput("other")->node();
    const bool divides_by_sum = is_aten(e->node(), {"exp"}) && is_aten(sum, {"sum"}) && sum->inputs().size() == 4 &&
                                sum->namedInput("self") == e && is_none(sum->namedInput("dtype"));
    const auto dim = divides_by_sum ? kept_dimension(sum) : std::nullopt;
    if (dim) {
      Value* shifted = e->node()->input();
      return Softmax{before_shift(shifted, *dim), graph.insertConstant(*dim), nullptr, {e, shifted, sum->output()}};
    }
  }
  if (is_aten(node, {"softmax"})) {
    const auto dim = constant_int(node->namedInput("dim"));
    Value* shifted = node->namedInput("self");
    Value* x = dim ? before_shift(shifted, *dim) : shifted;
    if (x != shifted) {
      return Softmax{x, node->namedInput("dim"), node->namedInput("dtype"), {shifted}};
    }
  }
  return std::nullopt;
}

}  // namespace

void raise_softmax(const std::shared_ptr<Graph>& graph) {
  const Writes writes(graph);
  bool changed = false;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_in_place(node)) {
      return;
    }
    const torch::jit::WithInsertPoint before(node);
    const auto softmax = spelled(*graph, node);
    if (!softmax || writes.reach(softmax->x) ||
        std::any_of(softmax->passed.begin(), softmax->passed.end(), [&](const Value* v) { return writes.reach(v); })) {
      return;
    }
    Value* dtype = softmax->dtype ? softmax->dtype : graph->insertConstant(c10::IValue());
    Value* result = graph->insert(c10::aten::softmax, {softmax->x, softmax->dim, dtype});
    result->node()->setSourceRange(node->sourceRange());
    node->output()->replaceAllUsesWith(result);
    changed = true;
  });
  if (changed) {
    torch::jit::EliminateDeadCode(graph);
  }
}

}  // namespace torchgraft
