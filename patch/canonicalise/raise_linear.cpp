#include <torchgraft/patch/canonicalise/raise_linear.h>

#include <torchgraft/patch/graph/exchanged_dims.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <optional>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// One round over the graph. It destroys no node, because shapes are kept by value.
class LinearRaiser {
 public:
  LinearRaiser(const std::shared_ptr<Graph>& graph, const Module& module)
      : graph_(graph), module_(module), shapes_(module), writes_(graph) {}

  void raise_product(Node* node);
  void take_bias(Node* sum);
  void take_bias_behind_sum(Node* sum);

 private:
  static bool is_plain_sum(Node* sum) {
    return sum->inputs().size() == 3 && constant_double(sum->namedInput("alpha")) == 1.0;
  }
  bool lacks_bias(Value* value, Value* bias, const Node* sum);
  bool may_lack_bias(Value* value, Value* bias, const Node* sum);
  Value* with_bias(Value* product, Value* bias);
  std::optional<Shape> matrix(Value* weight);
  Value* transposed(Value* weight);
  Value* insert_linear(Value* x, Value* weight, Value* bias) {
    return graph_->insert(c10::aten::linear, {x, weight, bias});
  }

  std::shared_ptr<Graph> graph_;
  const Module& module_;
  SymbolicShapes shapes_;
  Writes writes_;
};

// The shape of a floating-point parameter or constant of rank 2, perhaps rearranged; nullopt for any other value.
std::optional<Shape> LinearRaiser::matrix(Value* weight) {
  const at::Tensor tensor = weight_source(weight, module_).tensor;
  if (!tensor.defined() || !at::isFloatingType(tensor.scalar_type())) {
    return std::nullopt;
  }
  const auto shape = shapes_.shape(weight);
  const bool is_matrix = shape && shape->size() == 2 && (*shape)[0].is_constant() && (*shape)[1].is_constant();
  return is_matrix ? shape : std::nullopt;
}

// Inserts [in, out] as [out, in].
Value* LinearRaiser::transposed(Value* weight) {
  Node* node = weight->node();
  // permute(0, 1) and transpose(0, 0) exchange nothing, and the shape of a square does not show that.
  const bool is_transpose =
      exchanged_dims(shapes_, node, 2) == std::vector<size_t>{1, 0} && matrix(node->namedInput("self"));
  return is_transpose ? node->namedInput("self") : graph_->insert(c10::aten::t, {weight});
}

void LinearRaiser::raise_product(Node* node) {
  const bool adds = is_aten(node, {"addmm"});
  Value* x = node->namedInput(adds ? "mat1" : "self");
  Value* weight = node->namedInput(is_aten(node, {"matmul"}) ? "other" : "mat2");
  const bool scales =
      adds && (constant_double(node->namedInput("beta")) != 1.0 || constant_double(node->namedInput("alpha")) != 1.0);
  if (!matrix(weight) || scales || resolve_tensor(x, module_).defined()) {  // two parameters: nothing flows through
    return;
  }
  torch::jit::WithInsertPoint guard(node);
  Value* result = insert_linear(x, transposed(weight), graph_->insertConstant(c10::IValue()));
  if (adds) {
    result = graph_->insert(c10::aten::add, {result, node->namedInput("self")});
  }
  node->output()->replaceAllUsesWith(result);
}

// Whether `value` is a linear map without a bias, which nothing but its reader in the block of `sum` reads, that can
// have `bias` where `sum` stands.
bool LinearRaiser::lacks_bias(Value* value, Value* bias, const Node* sum) {
  Node* linear = value->node();
  const bool alone = linear->owningBlock() == sum->owningBlock() && data_uses(value).size() == 1;
  if (!is_aten(linear, {"linear"}) || !is_none(linear->namedInput("bias")) || !alone) {
    return false;
  }
  // The linear map with the bias reads its input where the sum stands.
  if (writes_.reach(linear->namedInput("input")) || writes_.reach(linear->namedInput("weight"))) {
    return false;
  }
  const at::Tensor weight = weight_source(linear->namedInput("weight"), module_).tensor;
  const at::Tensor tensor = resolve_tensor(bias, module_);
  const auto shape = shapes_.shape(linear->namedInput("weight"));
  return weight.defined() && tensor.defined() && tensor.scalar_type() == weight.scalar_type() && shape &&
         tensor.dim() == 1 && number(tensor.size(0)) == shape->front();
}

// Whether the bias may be of a map in `value`: of a product, or of a branch that was added to another before, as in
// parallel blocks. A residual stream is no such sum, for its block reads it, too.
bool LinearRaiser::may_lack_bias(Value* value, Value* bias, const Node* sum) {
  value = strip_passive(value);
  return lacks_bias(value, bias, sum) || (is_aten(value->node(), {"add"}) && data_uses(value).size() == 1);
}

Value* LinearRaiser::with_bias(Value* product, Value* bias) {
  Node* linear = product->node();
  return insert_linear(linear->namedInput("input"), linear->namedInput("weight"), bias);
}

// Makes one node of linear(x, w) + b, if nothing else reads the product.
void LinearRaiser::take_bias(Node* sum) {
  if (!is_plain_sum(sum)) {
    return;
  }
  for (const size_t i : {0, 1}) {
    if (lacks_bias(sum->input(i), sum->input(1 - i), sum)) {
      torch::jit::WithInsertPoint guard(sum);
      sum->output()->replaceAllUsesWith(with_bias(sum->input(i), sum->input(1 - i)));
      return;
    }
  }
}

// Makes y + linear(x, w, b) of (y + linear(x, w)) + b, if nothing else reads the sum without b, and y lacks no bias.
void LinearRaiser::take_bias_behind_sum(Node* sum) {
  if (!is_plain_sum(sum)) {
    return;
  }
  for (const size_t i : {0, 1}) {
    Node* inner = sum->input(i)->node();
    Value* bias = sum->input(1 - i);
    if (!is_aten(inner, {"add"}) || is_in_place(inner) || !is_plain_sum(inner) ||
        inner->owningBlock() != sum->owningBlock() || data_uses(sum->input(i)).size() != 1) {
      continue;
    }
    for (const size_t k : {0, 1}) {
      Value* product = inner->input(k);
      Value* other = inner->input(1 - k);
      if (!lacks_bias(product, bias, sum) || may_lack_bias(other, bias, sum) || writes_.reach(other)) {
        continue;
      }
      torch::jit::WithInsertPoint guard(sum);
      sum->output()->replaceAllUsesWith(graph_->insert(c10::aten::add, {other, with_bias(product, bias)}));
      return;
    }
  }
}

// Calls `method` on the nodes of these kinds, then drops dead code.
void run_round(const std::shared_ptr<Graph>& graph, const Module& module, std::initializer_list<const char*> kinds,
               void (LinearRaiser::*method)(Node*)) {
  LinearRaiser raiser(graph, module);
  std::vector<Node*> nodes;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, kinds) && !is_in_place(node)) {
      nodes.push_back(node);
    }
  });
  for (Node* node : nodes) {
    (raiser.*method)(node);
  }
  torch::jit::EliminateDeadCode(graph);
}

}  // namespace

void raise_linear(const std::shared_ptr<Graph>& graph, const Module& module) {
  run_round(graph, module, {"matmul", "mm", "addmm"}, &LinearRaiser::raise_product);
  run_round(graph, module, {"add"}, &LinearRaiser::take_bias);
  run_round(graph, module, {"add"}, &LinearRaiser::take_bias_behind_sum);
}

}  // namespace torchgraft
