#include <torchgraft/patch/canonicalise/affine_path.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <string>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool is_product(const Node* node) { return is_aten(node, {"matmul", "bmm", "baddbmm"}); }

Value* left_factor(Node* product) { return product->input(is_aten(product, {"baddbmm"}) ? 1 : 0); }

Value* right_factor(Node* product) { return product->input(is_aten(product, {"baddbmm"}) ? 2 : 1); }

bool is_reshape(const Node* node) { return is_aten(node, {"view", "reshape", "_unsafe_view", "unflatten", "flatten"}); }

// A number, or a tensor of rank 0 that is computed from numbers: GPT-2 divides by torch.full([], sqrt(d)), and a trace
// of `q.size(-1) ** -0.5` computes with sizes as tensors.
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
         std::all_of(node->inputs().begin(), node->inputs().end(),
                     [](const Value* input) { return !is_tensor(input) || is_number(input); });
}

namespace {

// The operand of `node` that carries the scores; nullopt when `node` is no step of a path that is understood.
std::optional<size_t> score_operand(const Node* node);

}  // namespace

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

namespace {

std::optional<size_t> score_operand(const Node* node) {
  if (is_aten(node, {"div", "mul"})) {
    const bool rounds = node->inputs().size() > 2 && !is_none(node->input(2));
    return is_number(node->input(1)) && !rounds ? std::optional<size_t>(0) : std::nullopt;
  }
  if (is_aten(node, {"to", "type_as", "masked_fill", "contiguous"}) || is_reshape(node)) {
    return 0;
  }
  if (is_aten(node, {"where"}) && node->inputs().size() == 3) {
    for (size_t i : {1, 2}) {
      if (is_tensor(node->input(i)) && find_product(node->input(i))) {
        return i;
      }
    }
    return std::nullopt;
  }
  if (is_aten(node, {"sub"})) {
    return 0;
  }
  if (is_aten(node, {"add"})) {
    // Either side may be the scores; relative position biases are products too, so prefer the left one.
    for (size_t i : {0, 1}) {
      const bool scaled = i == 1 && !has_unit_alpha(node);  // add(x, y, alpha) is x + alpha y
      if (is_tensor(node->input(i)) && !scaled && find_product(node->input(i))) {
        return i;
      }
    }
  }
  return std::nullopt;
}

// Calls `visit` for every node of the path from `scores` back to the product, whichever side of a branch it is on.
void for_each_step(const Value* scores, const Node* product, const std::function<void(Node*)>& visit) {
  Node* node = const_cast<Value*>(scores)->node();
  if (node == product) {
    return;
  }
  visit(node);
  if (node->kind() == c10::prim::If) {
    for (Block* block : node->blocks()) {
      for_each_step(block->outputs()[scores->offset()], product, visit);
    }
    return;
  }
  for_each_step(node->input(score_operand(node).value()), product, visit);
}

// The number in every element of `value`; nullopt when it is not known.
std::optional<double> filled_with(const Value* value, const torch::jit::Module& root) {
  if (const auto number = constant_double(value)) {
    return number;
  }
  const Node* node = value->node();
  if (const at::Tensor tensor = resolve_tensor(value, root); tensor.defined()) {
    return tensor.numel() == 1 ? std::optional(tensor.item<double>()) : std::nullopt;
  }
  if (is_aten(node, {"full"})) {
    return filled_with(node->namedInput("fill_value"), root);
  }
  if (is_aten(node, {"tensor", "scalar_tensor", "to", "type_as", "expand", "expand_as", "view"}) ||
      node->kind() == c10::prim::NumToTensor) {
    return filled_with(node->input(0), root);
  }
  return std::nullopt;
}

// The inputs whose elements `node` reads: not those of which it only takes the size, the dtype or the device.
at::ArrayRef<const Value*> elements_read(const Node* node) {
  const auto inputs = node->inputs();
  if (is_aten(node, {"size", "dim", "numel", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones"}) ||
      node->kind() == c10::prim::dtype || node->kind() == c10::prim::device) {
    return {};
  }
  if (is_aten(node, {"full_like", "new_full"})) {
    return inputs.slice(1);
  }
  return is_aten(node, {"expand_as", "view_as", "reshape_as", "type_as"}) ? inputs.slice(0, 1) : inputs;
}

bool is_computed_from(const Value* value, const Value* source) {
  std::vector<const Value*> frontier = {value};
  std::unordered_set<const Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    if (frontier[i] == source) {
      return true;
    }
    const auto add = [&](const Value* next) {
      if (seen.insert(next).second) {
        frontier.push_back(next);
      }
    };
    const Node* node = frontier[i]->node();
    const auto inputs = elements_read(node);
    std::for_each(inputs.begin(), inputs.end(), add);
    for (const Block* block : node->blocks()) {
      std::for_each(block->outputs().begin(), block->outputs().end(), add);
    }
  }
  return false;
}

// Scores up to this count as masked (ops/attention_token_mask.h): e^-9000 is zero in every dtype.
constexpr double kMasked = -9000.0;

}  // namespace

torch::jit::ValueSet path_values(const Value* scores, const Node* product) {
  torch::jit::ValueSet values;
  for_each_step(scores, product, [&](Node* node) {
    for (at::ArrayRef<Value*> group : {node->inputs(), node->outputs()}) {
      std::copy_if(group.begin(), group.end(), std::inserter(values, values.end()), is_tensor);
    }
  });
  values.insert(product->output());
  return values;
}

std::optional<std::string> why_no_mask(const Value* scores, const Node* product, const torch::jit::Module& root) {
  std::optional<std::string> reason;
  for_each_step(scores, product, [&](Node* node) {
    const bool fills = is_aten(node, {"masked_fill"});
    if (reason || (!fills && !is_aten(node, {"where"}))) {
      return;
    }
    if (is_computed_from(node->input(fills ? 1 : 0), product->output())) {
      reason = described(node) + " decides by the scores themselves which of them it replaces";
      return;
    }
    // masked_fill(scores, mask, value); where(condition, scores, value), or the other way round.
    const bool scores_come_last = !fills && score_operand(node) == 2;
    const auto value = filled_with(node->input(scores_come_last ? 1 : 2), root);
    if (!value || !(*value <= kMasked)) {
      reason = described(node) + " sets scores to " + (value ? c10::str(*value) : "what is not a constant") +
               ", which is no mask: expected -inf, or at most " + c10::str(kMasked);
    }
  });
  return reason;
}

Value* AffinePath::zero_like(Value* value) {
  Value* dtype = graph_->insert(c10::prim::dtype, {anchor_});
  return graph_->insert(c10::aten::zeros_like, {value}, {torch::jit::NamedValue("dtype", dtype)});
}

Value* AffinePath::copy_with(Node* node, size_t operand, Value* replacement) {
  TORCH_INTERNAL_ASSERT(!is_in_place(node),
                        "raise_attention takes no path that writes into its scores: ", described(node));
  Node* copy = graph_->createClone(node, [](Value* v) { return v; });
  copy->replaceInput(operand, replacement);
  return graph_->insertNode(copy)->output();
}

// Whether `bias` is known to be as large as the scores, [B * h, S, S]. Then it can be reshaped like them (DeBERTa's
// relative position scores); a bias that broadcasts cannot.
bool AffinePath::is_full(Value* bias) {
  const auto have = shapes_.shape(bias);
  const auto scores = shapes_.shape(product_->output());
  return have && scores && have->size() == scores->size() && have->front() == scores->front() &&
         std::find(have->begin(), have->end(), number(1)) == have->end();
}

// The term beta * bias of baddbmm(bias, q, k, beta, alpha). alpha is a factor of the scores.
Value* AffinePath::bias_of_product() {
  const auto beta = constant_double(product_->namedInput("beta"));
  const auto alpha = constant_double(product_->namedInput("alpha"));
  understood = understood && beta && alpha;
  factors.constant *= alpha.value_or(1.0);
  if (beta == 0.0) {
    return nullptr;
  }
  return beta == 1.0 ? product_->namedInput("self")
                     : graph_->insert(c10::aten::mul, {product_->namedInput("self"), product_->namedInput("beta")});
}

// BLOOM adds its ALiBi [B * h, 1, S] to scores [B * h, S, S] and views the sum as [B, h, S, S]. A bias that broadcasts
// cannot be viewed so, but its heads can be set apart: [B, h, 1, S]. Null when `reshape` is no such view, or when
// `bias` has no row per head.
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
    return is_aten(node, {"baddbmm"}) ? bias_of_product() : nullptr;
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
  if (!inner && is_aten(node, {"add"}) && has_unit_alpha(node)) {
    return node->input(1 - operand);
  }
  return copy_with(node, operand, inner ? inner : zero_like(node->input(1 - operand)));
}

// Inserts a copy of `branch` for zero scores: its blocks compute their masks as before, and yield a bias, not scores.
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
  // A side that adds nothing yields a zero that broadcasts against the scores.
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

}  // namespace torchgraft
