#include <torchgraft/patch/passes/lower_linear_forms.h>

#include <torchgraft/patch/graph_utils.h>
#include <torchgraft/patch/symbolic_shape.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool is_view(const Node* node) { return is_aten(node, {"view", "reshape", "_unsafe_view"}); }

// The sizes [rows, columns] of a product's right factor that is a parameter; nullopt when it is none of rank 2.
std::optional<Shape> weight_shape(Value* weight, const torch::jit::Module& module, SymbolicShapes& shapes) {
  const auto shape = shapes.shape(weight);
  const bool known = shape && shape->size() == 2 && (*shape)[0].is_constant() && (*shape)[1].is_constant();
  return known && weight_source(weight, module).tensor.defined() ? shape : std::nullopt;
}

// weight^T, [out, in] as linear wants it.
Value* insert_transposed(Graph& graph, Value* weight) {
  Node* node = weight->node();
  const bool is_transpose =
      is_aten(node, {"t"}) || (is_aten(node, {"transpose"}) && constant_int(node->input(1)) != constant_int(node->input(2)));
  return is_transpose ? node->input(0) : graph.insert(c10::aten::t, {weight});
}

bool is_one(const Value* value) { return constant_double(value) == 1.0; }

// addmm(bias, x, w): on x of rank 2, or on a view of x whose result is viewed back.
void lower_addmm(Graph& graph, Node* node, const torch::jit::Module& module, SymbolicShapes& shapes) {
  const auto weight = weight_shape(node->input(2), module, shapes);
  if (!weight || !is_one(node->input(3)) || !is_one(node->input(4))) {
    return;
  }
  Value* x = node->input(1);
  Value* result = node->output();
  const auto uses = data_uses(result);
  if (is_view(x->node()) && uses.size() == 1 && is_view(uses[0].user)) {
    Value* whole = x->node()->input(0);
    auto before = shapes.shape(whole);
    const auto after = shapes.shape(uses[0].user->output());
    if (before && after && !before->empty() && before->back() == (*weight)[0]) {
      before->back() = (*weight)[1];
      if (before == after) {
        x = whole;
        result = uses[0].user->output();
      }
    }
  }
  torch::jit::WithInsertPoint guard(node);
  Value* linear = graph.insert(c10::aten::linear, {x, insert_transposed(graph, node->input(2)), node->input(0)});
  result->replaceAllUsesWith(linear);
}

// The add of a bias of rank 1 that alone reads `product`; null when there is none.
Node* bias_add(Value* product, const Dim& width, SymbolicShapes& shapes) {
  const auto uses = data_uses(product);
  if (uses.size() != 1 || !is_aten(uses[0].user, {"add"}) || uses[0].offset > 1) {
    return nullptr;
  }
  Node* add = uses[0].user;
  const auto bias = shapes.shape(add->input(1 - uses[0].offset));
  const bool fits = bias && bias->size() == 1 && bias->front() == width;
  return fits && (add->inputs().size() < 3 || is_one(add->input(2))) ? add : nullptr;
}

void lower_matmul(Graph& graph, Node* node, const torch::jit::Module& module, SymbolicShapes& shapes) {
  const auto weight = weight_shape(node->input(1), module, shapes);
  const auto x = shapes.shape(node->input(0));
  if (!weight || (x && x->size() < 2) || resolve_tensor(node->input(0), module).defined()) {
    return;
  }
  Node* add = bias_add(node->output(), (*weight)[1], shapes);
  Value* bias = add ? add->input(add->input(0) == node->output() ? 1 : 0) : nullptr;
  const bool at_hand = bias && (bias->node()->isBefore(node) || bias->node()->kind() == c10::prim::Param);
  Node* last = add && at_hand ? add : node;
  torch::jit::WithInsertPoint guard(node);
  Value* none = graph.insertConstant(c10::IValue());
  Value* linear = graph.insert(c10::aten::linear,
                               {node->input(0), insert_transposed(graph, node->input(1)), last == add ? bias : none});
  last->output()->replaceAllUsesWith(linear);
}

}  // namespace

void lower_linear_forms(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module) {
  std::vector<Node*> candidates;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"addmm", "matmul", "mm"})) {
      candidates.push_back(node);
    }
  });
  SymbolicShapes shapes(module);
  for (Node* node : candidates) {
    if (is_aten(node, {"addmm"})) {
      lower_addmm(*graph, node, module, shapes);
    } else {
      lower_matmul(*graph, node, module, shapes);
    }
  }
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace torchgraft
