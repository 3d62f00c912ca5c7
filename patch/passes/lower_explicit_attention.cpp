#include <torchgraft/patch/passes/lower_explicit_attention.h>

#include <torchgraft/patch/graph_utils.h>
#include <torchgraft/patch/symbolic_shape.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <optional>
#include <unordered_map>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// queries times keys: matmul(q, k), bmm(q, k) or baddbmm(bias, q, k).
bool is_product(const Node* node) { return is_aten(node, {"matmul", "bmm", "baddbmm"}); }

Value* left_factor(Node* product) { return product->input(is_aten(product, {"baddbmm"}) ? 1 : 0); }

Value* right_factor(Node* product) { return product->input(is_aten(product, {"baddbmm"}) ? 2 : 1); }

// Between [B * h, S, S] and [B, h, S, S].
bool is_reshape(const Node* node) { return is_aten(node, {"view", "reshape", "_unsafe_view", "unflatten", "flatten"}); }

// A number, or a tensor of rank 0 that is computed from numbers: GPT-2 divides by torch.full([], sqrt(d)), and a trace of
// `q.size(-1) ** -0.5` computes with sizes as tensors.
bool is_number(const Value* value) {
  const auto kind = value->type()->kind();
  if (kind == c10::TypeKind::IntType || kind == c10::TypeKind::FloatType || kind == c10::TypeKind::NumberType) {
    return true;
  }
  const Node* node = value->node();
  if (constant_double(value) || node->kind() == c10::prim::NumToTensor) {
    return true;
  }
  if (is_aten(node, {"full"})) {
    const auto sizes = resolve_constant(node->input(0));
    return sizes && sizes->toListRef().empty();
  }
  return is_aten(node, {"pow", "sqrt", "rsqrt", "reciprocal", "mul", "div", "to"}) &&
         std::all_of(node->inputs().begin(), node->inputs().end(), [](const Value* input) {
           return !input->type()->isSubtypeOf(*c10::TensorType::get()) || is_number(input);
         });
}

// The index of the operand of `node` that carries the scores on, for a step of the path that this pass understands.
std::optional<size_t> score_operand(const Node* node);

// The product of queries and keys that `scores` comes from, when every step in between is understood.
Node* find_product(const Value* scores) {
  Node* node = const_cast<Value*>(scores)->node();
  if (is_product(node)) {
    return node;
  }
  if (node->kind() == c10::prim::If) {
    const size_t i = scores->offset();
    Node* left = find_product(node->blocks()[0]->outputs()[i]);
    Node* right = find_product(node->blocks()[1]->outputs()[i]);
    return left == right ? left : nullptr;
  }
  const auto operand = score_operand(node);
  return operand ? find_product(node->input(*operand)) : nullptr;
}

std::optional<size_t> score_operand(const Node* node) {
  if (is_aten(node, {"div", "mul"})) {
    return is_number(node->input(1)) ? std::optional<size_t>(0) : std::nullopt;
  }
  if (is_aten(node, {"to", "type_as", "masked_fill", "contiguous"}) || is_reshape(node)) {
    return 0;
  }
  if (is_aten(node, {"where"}) && node->inputs().size() == 3) {
    return 1;
  }
  if (is_aten(node, {"sub"})) {
    return 0;
  }
  if (is_aten(node, {"add"})) {
    // Either side may be the scores; relative position biases are products too, so prefer the left one.
    for (size_t i : {0, 1}) {
      if (node->input(i)->type()->isSubtypeOf(*c10::TensorType::get()) && find_product(node->input(i))) {
        return i;
      }
    }
  }
  return std::nullopt;
}

// The slope of an affine path: the product of its constant factors, and the numbers that are known only at run time.
struct Factors {
  double constant = 1.0;
  std::vector<std::pair<Value*, bool>> dynamic;  // (number, divides)
  bool operator==(const Factors&) const = default;
};

// Follows the path from the scores' product to the softmax and rebuilds its two parts.
class AffinePath {
 public:
  // `anchor` is a value that exists before the attention and has its dtype and device.
  AffinePath(const std::shared_ptr<Graph>& graph, SymbolicShapes& shapes, Node* product, Value* anchor)
      : graph_(graph), shapes_(shapes), product_(product), anchor_(anchor) {}

  // Inserts, at the graph's insertion point, what the path makes of zero scores. Null stands for zero.
  Value* bias(Value* scores);

  Factors factors;
  bool understood = true;
  bool reshaped = false;

 private:
  Value* of_branch(Node* branch, size_t output);
  Value* zero_like(Value* value);
  Value* copy_with(Node* node, size_t operand, Value* replacement);

  bool is_full(Value* bias);
  Value* with_heads_apart(Node* reshape, Value* bias);

  std::shared_ptr<Graph> graph_;
  SymbolicShapes& shapes_;
  Node* product_;
  Value* anchor_;
};

Value* AffinePath::zero_like(Value* value) {
  Value* dtype = graph_->insert(c10::prim::dtype, {anchor_});
  return graph_->insert(c10::aten::zeros_like, {value}, {torch::jit::NamedValue("dtype", dtype)});
}

Value* AffinePath::copy_with(Node* node, size_t operand, Value* replacement) {
  Node* copy = graph_->createClone(node, [](Value* v) { return v; });
  copy->replaceInput(operand, replacement);
  // In place would write into the zeros or into a mask that others read.
  const std::string name = node->kind().toUnqualString();
  if (name.back() == '_') {
    Node* functional = graph_->create(c10::Symbol::aten(name.substr(0, name.size() - 1)), copy->inputs(), 1);
    copy->destroy();
    copy = functional;
  }
  return graph_->insertNode(copy)->output();
}

// Whether `bias` is visibly as large as the scores, [B * h, S, S], so that it can be reshaped as they are (DeBERTa's
// relative position scores); what broadcasts cannot.
bool AffinePath::is_full(Value* bias) {
  const auto have = shapes_.shape(bias);
  const auto scores = shapes_.shape(product_->output());
  return have && scores && have->size() == scores->size() && have->front() == scores->front() &&
         std::find(have->begin(), have->end(), number(1)) == have->end();
}

// BLOOM views scores [B * h, S, S], with its ALiBi [B * h, 1, S] added, as [B, h, S, S]. What broadcasts cannot be viewed
// so, but its heads can be set apart: [B, h, 1, S]. Null when `reshape` is no such view, or `bias` has no row per head.
Value* AffinePath::with_heads_apart(Node* reshape, Value* bias) {
  const auto have = shapes_.shape(bias);
  const auto before = shapes_.shape(product_->output());
  const auto after = shapes_.shape(reshape->output());
  const bool splits = before && after && before->size() == 3 && after->size() == 4 && (*after)[1].is_constant();
  const bool has_rows = have && have->size() == 3 && !have->front().is_constant();
  if (!splits || !has_rows || is_full(bias) || have->front().factor % (*after)[1].factor != 0) {
    return nullptr;
  }
  Value* sizes = graph_->insertConstant(std::vector<int64_t>{-1, (*after)[1].factor});
  return graph_->insert(c10::Symbol::aten("unflatten"), {bias, 0, sizes});
}

Value* AffinePath::bias(Value* scores) {
  Node* node = scores->node();
  if (node == product_) {
    return is_aten(node, {"baddbmm"}) ? node->input(0) : nullptr;
  }
  if (node->kind() == c10::prim::If) {
    return of_branch(node, scores->offset());
  }
  const size_t operand = score_operand(node).value();
  Value* inner = bias(node->input(operand));
  if (is_aten(node, {"mul", "div"})) {
    const bool divides = is_aten(node, {"div"});
    if (const auto factor = constant_double(node->input(1))) {
      factors.constant = divides ? factors.constant / *factor : factors.constant * *factor;
    } else {
      factors.dynamic.emplace_back(node->input(1), divides);
    }
    return inner ? copy_with(node, operand, inner) : nullptr;
  }
  if (is_aten(node, {"to", "type_as", "contiguous"})) {
    return inner;  // the mask is cast to the queries' dtype at the end
  }
  if (is_reshape(node)) {
    reshaped = true;
    if (!inner) {
      return nullptr;
    }
    if (Value* per_head = with_heads_apart(node, inner)) {
      return per_head;
    }
    understood = understood && is_full(inner);
    return copy_with(node, operand, inner);
  }
  if (is_aten(node, {"masked_fill"})) {
    return copy_with(node, operand, inner ? inner : zero_like(node->input(1)));
  }
  if (is_aten(node, {"where"})) {
    return copy_with(node, operand, inner ? inner : zero_like(node->input(0)));
  }
  const bool unit_alpha = node->inputs().size() < 3 || constant_double(node->input(2)) == 1.0;
  if (!inner && is_aten(node, {"add"}) && unit_alpha) {
    return node->input(1 - operand);
  }
  return copy_with(node, operand, inner ? inner : zero_like(node->input(1 - operand)));
}

// The same branch with zero scores: its blocks compute their masks as before and yield a bias instead of scores.
Value* AffinePath::of_branch(Node* branch, size_t output) {
  Node* copy = graph_->insertNode(graph_->create(c10::prim::If, {branch->input()}, 0));
  Value* results[2];
  bool is_zero[2];
  const Factors before = factors;
  Factors after[2];
  for (size_t i = 0; i < 2; ++i) {
    Block* block = copy->addBlock();
    block->cloneFrom(branch->blocks()[i], [](Value* v) { return v; });
    Value* scores = block->outputs()[output];
    torch::jit::WithInsertPoint guard(block);
    factors = before;
    results[i] = bias(scores);
    after[i] = factors;
    is_zero[i] = results[i] == nullptr;
    while (!block->outputs().empty()) {
      block->eraseOutput(block->outputs().size() - 1);
    }
  }
  // The path above the branch was followed from both sides; a factor inside one side only would make the scale depend
  // on the condition.
  understood = understood && after[0] == after[1];
  // A branch that keeps its scores contributes a zero that broadcasts against them.
  const auto scores_shape = shapes_.shape(branch->outputs()[output]);
  const bool heads_in_rows = scores_shape && scores_shape->size() == 3;  // [B * h, S, S], to be unflattened
  for (size_t i = 0; i < 2; ++i) {
    Block* block = copy->blocks()[i];
    if (is_zero[i]) {
      torch::jit::WithInsertPoint guard(block);
      Value* shape = graph_->insertConstant(std::vector<int64_t>{1, 1, 1, 1});
      if (heads_in_rows) {
        Value* one = graph_->insertConstant(1);
        Value* rows = graph_->insert(c10::aten::size, {left_factor(product_), 0});
        shape = graph_->insertNode(graph_->createList(c10::IntType::get(), {rows, one, one}))->output();
      }
      Value* dtype = graph_->insert(c10::prim::dtype, {anchor_});
      Value* device = graph_->insert(c10::prim::device, {anchor_});
      results[i] = graph_->insert(c10::aten::zeros, {shape},
                                  {torch::jit::NamedValue("dtype", dtype), torch::jit::NamedValue("device", device)});
    }
    block->registerOutput(results[i]);
  }
  return copy->addOutput()->setType(c10::TensorType::get());
}

// softmax -> [cast] -> [dropout] -> product with the values. `dropout` is null when there is none.
struct Consumer {
  Node* dropout = nullptr;
  Node* product = nullptr;
};

std::optional<Consumer> find_consumer(Node* softmax, std::string& reason) {
  Consumer result;
  Value* current = softmax->output();
  while (true) {
    const auto uses = data_uses(current);
    if (uses.size() != 1) {
      reason = uses.empty() ? "its result is not used" : "the attention probabilities are used elsewhere too";
      return std::nullopt;
    }
    Node* user = uses[0].user;
    if (is_aten(user, {"matmul", "bmm"}) && uses[0].offset == 0) {
      result.product = user;
      return result;
    }
    if (is_aten(user, {"dropout"}) && !result.dropout) {
      result.dropout = user;
    } else if (!is_aten(user, {"to", "type_as", "contiguous"}) && !is_reshape(user)) {
      reason = "no product with values follows it";
      return std::nullopt;
    }
    current = user->output();
  }
}

Value* insert_dropout_p(Graph& graph, Node* dropout) {
  if (!dropout) {
    return graph.insertConstant(0.0);
  }
  Value* p = dropout->input(1);
  Value* training = dropout->input(2);
  if (const auto constant = torch::jit::toIValue(training)) {
    return constant->toBool() ? p : graph.insertConstant(0.0);
  }
  Value* on = graph.insert(c10::aten::Float, {training});
  return graph.insert(c10::aten::mul, {p, on});
}

Value* insert_transposed(Graph& graph, SymbolicShapes& shapes, Value* keys_transposed) {
  Node* node = keys_transposed->node();
  if (is_aten(node, {"transpose"})) {
    const auto a = constant_int(node->input(1));
    const auto b = constant_int(node->input(2));
    const auto shape = shapes.shape(node->input(0));
    const int64_t rank = shape ? static_cast<int64_t>(shape->size()) : 0;
    const auto from_the_end = [&](int64_t dim) { return dim >= 0 ? dim - rank : dim; };
    if (a && b && from_the_end(*a) + from_the_end(*b) == -3 && std::abs(from_the_end(*a) - from_the_end(*b)) == 1) {
      return node->input(0);
    }
  }
  return graph.insert(c10::aten::transpose, {keys_transposed, -2, -1});
}

// [B * h, S, d] as [B, h, S, d]; what is of rank 4 stays as it is. Null when the rank or the head count is not known.
Value* insert_rank_4(Graph& graph, SymbolicShapes& shapes, Value* value) {
  const auto shape = shapes.shape(value);
  if (!shape || (shape->size() != 3 && shape->size() != 4)) {
    return nullptr;
  }
  if (shape->size() == 4) {
    return value;
  }
  if (shape->front().is_constant()) {
    return nullptr;
  }
  Value* sizes = graph.insertConstant(std::vector<int64_t>{-1, shape->front().factor});
  return graph.insert(c10::Symbol::aten("unflatten"), {value, 0, sizes});
}

// `value` before it was multiplied with, or divided by, numbers, which go to `factors`.
Value* take_scale(Value* value, SymbolicShapes& shapes, Factors& factors) {
  for (Node* node = value->node(); is_aten(node, {"div", "mul"}) && node->inputs().size() == 2; node = value->node()) {
    Value* factor = node->input(1);
    const auto shape = is_number(factor) ? Shape() : shapes.shape(factor).value_or(Shape{number(-1)});
    if (!shape.empty()) {
      break;
    }
    factors.dynamic.emplace_back(factor, is_aten(node, {"div"}));
    value = node->input(0);
  }
  return value;
}

// The bias as something that broadcasts against [B, h, S, S].
Value* insert_mask(Graph& graph, SymbolicShapes& shapes, Value* bias, Value* anchor, bool product_is_rank_3,
                   bool& understood) {
  if (!bias) {
    return graph.insertConstant(c10::IValue());
  }
  if (product_is_rank_3) {
    const auto shape = shapes.shape(bias);
    const bool per_head = shape && shape->size() == 3 && !shape->front().is_constant();
    understood = understood && shape.has_value();
    bias = per_head ? insert_rank_4(graph, shapes, bias) : bias;
  }
  bias = graph.insert(c10::Symbol::aten("atleast_2d"), {bias});  // what scaled_dot_product_attention asks for
  return graph.insert(c10::aten::type_as, {bias, anchor});
}

// Rewrites the attention around `softmax`; the reason why not when it cannot.
std::optional<std::string> lower_one(const std::shared_ptr<Graph>& graph, SymbolicShapes& shapes, Node* softmax) {
  std::string reason;
  const auto consumer = find_consumer(softmax, reason);
  if (!consumer) {
    return reason;
  }
  Node* product = find_product(softmax->input(0));
  if (!product) {
    return "its input does not come from a product of queries and keys by scaling and masking alone";
  }
  if (product->owningBlock() != softmax->owningBlock() || consumer->product->owningBlock() != softmax->owningBlock()) {
    return "its products with keys and values are not in the same block";
  }
  const auto dim = constant_int(softmax->input(1));
  const auto rank = shapes.shape(left_factor(product));
  const auto value_rank = shapes.shape(consumer->product->input(1));
  if (!rank || !value_rank) {
    return "the rank of its queries or values is not known";
  }
  if (!dim || (*dim != -1 && *dim != 3 && *dim != static_cast<int64_t>(rank->size()) - 1)) {
    return "it is not over the last dimension";
  }
  torch::jit::WithInsertPoint guard(consumer->product);
  // The mask must not depend on the queries: gates that are pooled over real tokens need it before they exist.
  const auto linears = nearest_linears(left_factor(product));
  Value* anchor = linears.empty() ? left_factor(product) : linears.front()->input(0);
  AffinePath path(graph, shapes, product, anchor);
  Value* bias = path.bias(softmax->input(0));
  // A reshape on the way means that masks were applied in rank 4.
  const bool masked_in_rank_3 = rank->size() == 3 && value_rank->size() == 3 && *dim != 3 && !path.reshaped;
  Value* mask = insert_mask(*graph, shapes, bias, anchor, masked_in_rank_3, path.understood);
  Value* query = insert_rank_4(*graph, shapes, left_factor(product));
  // A scale on the keys is one on all scores: prefixes, which come beside the keys, have it too.
  Value* keys_transposed = take_scale(right_factor(product), shapes, path.factors);
  Value* keys = take_scale(insert_transposed(*graph, shapes, keys_transposed), shapes, path.factors);
  Value* key = insert_rank_4(*graph, shapes, keys);
  Value* value = insert_rank_4(*graph, shapes, consumer->product->input(1));
  if (!path.understood || !query || !key || !value) {
    return path.understood ? "the heads are not a dimension of their own" : "its scale or mask is not understood";
  }
  for (const auto& [factor, divides] : path.factors.dynamic) {
    query = graph->insert(divides ? c10::aten::div : c10::aten::mul, {query, factor});
  }
  Value* dropout_p = insert_dropout_p(*graph, consumer->dropout);
  Value* output = graph->insert(c10::aten::scaled_dot_product_attention, {query, key, value, mask, dropout_p, false},
                                {torch::jit::NamedValue("scale", path.factors.constant)});
  if (value_rank->size() == 3) {
    output = graph->insert(c10::aten::flatten, {output, 0, 1});
  }
  consumer->product->output()->replaceAllUsesWith(output);
  return std::nullopt;
}

}  // namespace

std::vector<UnloweredSoftmax> lower_explicit_attention(const std::shared_ptr<Graph>& graph,
                                                       const torch::jit::Module& module) {
  std::vector<Node*> candidates;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"softmax", "_softmax"})) {
      candidates.push_back(node);
    }
  });
  SymbolicShapes shapes(module);
  std::vector<UnloweredSoftmax> unlowered;
  for (Node* softmax : candidates) {
    if (const auto reason = lower_one(graph, shapes, softmax)) {
      unlowered.push_back({softmax, *reason});
    }
  }
  return unlowered;
}

}  // namespace torchgraft
