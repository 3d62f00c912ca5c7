#include <torchgraft/patch/canonicalise/affine_path.h>

#include <torchgraft/patch/canonicalise/mask_fills.h>
#include <torchgraft/patch/canonicalise/score_path.h>
#include <torchgraft/patch/graph/dtype_casts.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <cmath>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

namespace {

// A step that fills in -1e4 makes all scores of a row the same where it hides the whole row. A mask that is added does
// so, too, if it is so low that the sum rounds the score away. float16 (5) has no such numbers. Without a branch, which
// other passes would have to look into.
constexpr const char* kDeepFill = R"python(
def deep_fill(dtype: int, plain: float, deep: float) -> float:
    return plain + deep * float(dtype != 5)
)python";

// Integers lose what a float has behind its point: such a cast is not affine.
bool casts_to_integers(const Node* cast) {
  const auto dtype = is_dtype_cast(cast) ? constant_int(cast->namedInput("dtype")) : std::nullopt;
  return dtype && !at::isFloatingType(static_cast<at::ScalarType>(*dtype));
}

// A constant beside which scores keep their digits: a large one rounds them.
bool is_small_number(const Value* value) {
  constexpr double kMost = 64.0;
  const auto constant = constant_double(value);
  return constant && std::abs(*constant) <= kMost;
}

}  // namespace

// Scores of other keys may not come into a row: the softmax is over the last dimension.
bool AffinePath::keeps_last_dimension(Node* reshape) {
  const auto before = shapes_.shape(reshape->namedInput("self"));
  const auto after = shapes_.shape(reshape->output());
  const bool known = before && after && !before->empty() && !after->empty();
  return !known || before->back() == after->back();
}

// Whether `factor` has one number for all keys and queries, or one for each head of scores [B, h, S, S]. Such a
// factor can be moved to the queries, and then scales a prefix's scores too.
bool AffinePath::scales_keys_alike(Value* factor, const Value* scores) {
  const auto shape = shapes_.shape(factor);
  const auto scaled = shapes_.shape(scores);
  const size_t most = scaled ? scaled->size() : 4;  // a factor of more dimensions gives the scores more as well
  if (!shape || shape->size() > most) {
    return false;
  }
  const auto is_one = [](const auto& size) { return size == number(1); };
  if (std::all_of(shape->begin(), shape->end(), is_one)) {
    return shape->size() <= 4;
  }
  // Anything but the heads may be as many: scores [h, B, S, S] of a batch of h rows take a factor for each row too.
  Shape per_head = *shape;
  per_head.insert(per_head.begin(), most - per_head.size(), number(1));
  return scaled && most == 4 && is_one(per_head[0]) && per_head[1].is_constant() && per_head[1] == (*scaled)[1] &&
         is_one(per_head[2]) && is_one(per_head[3]);
}

// Whether a number, or one of each head, is added to the scores of all keys. As a mask it would not be a prefix's.
bool AffinePath::is_learned_for_all_keys(Value* added) {
  if (is_number(added)) {
    return true;
  }
  const auto shape = is_tensor(added) && is_learned(added) ? shapes_.shape(added) : std::nullopt;
  return shape && (shape->empty() || shape->back() == number(1));
}

Value* AffinePath::zero_like(Value* value, const Value* scores) {
  if (!is_tensor(value)) {
    return broadcasting_zero(scores);
  }
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

Value* AffinePath::with_deep_fill(Node* node, Value* copy) {
  constexpr double kDeep = 1e20;  // no score changes what is as large
  constexpr double kDeeper = 1e18;
  const size_t operand = fill_operand(node);
  Value* fill = copy->node()->input(operand);
  const auto number = filled_with(fill, shapes_.root());
  if (!number || std::abs(*number) >= kDeep) {
    return copy;
  }
  const torch::jit::WithInsertPoint before(copy->node());
  Value* dtype = graph_->insert(c10::prim::dtype, {anchor_});
  Value* deep =
      torch::jit::insertGraph(*graph_, *compile_graph(kDeepFill, "deep_fill"),
                              {dtype, graph_->insertConstant(*number), graph_->insertConstant(*number * kDeeper)})[0];
  const std::vector<torch::jit::NamedValue> named = {{"dtype", dtype}};
  copy->node()->replaceInput(operand,
                             is_tensor(fill) ? graph_->insert(c10::aten::full_like, {fill, deep}, named) : deep);
  return copy;
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
  understood = understood && beta;
  if (const auto alpha = constant_double(product_->namedInput("alpha"))) {
    factors.constant *= *alpha;
  } else {
    factors.dynamic.emplace_back(product_->namedInput("alpha"), /*divides=*/false);
  }
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
    Value* by = step_factor(node);
    if (const auto factor = constant_double(by)) {
      factors.constant = divides ? factors.constant / *factor : factors.constant * *factor;
    } else {
      understood = understood && (is_number(by) || scales_keys_alike(by, scores));
      factors.dynamic.emplace_back(by, divides);
    }
    return inner ? copy_with(node, operand, inner) : nullptr;
  }
  if (is_aten(node, {"to", "type_as", "contiguous"})) {
    understood = understood && !casts_to_integers(node);
    return inner;  // the mask is cast to the queries' dtype at the end
  }
  if (is_reshape(node)) {
    reshaped = true;
    understood = understood && keeps_last_dimension(node);
    if (!inner) {
      return nullptr;
    }
    if (Value* per_head = with_heads_apart(node, inner)) {
      return per_head;
    }
    understood = understood && is_full(inner);
    return copy_with(node, operand, inner);
  }
  if (is_aten(node, {"masked_fill", "where"})) {
    const char* mask = is_aten(node, {"where"}) ? "condition" : "mask";
    // What was added may be an integer, which cannot hold what is filled in.
    Value* filled =
        inner ? graph_->insert(c10::aten::type_as, {inner, anchor_}) : zero_like(node->namedInput(mask), scores);
    return with_deep_fill(node, copy_with(node, operand, filled));
  }
  if (is_aten(node, {"add", "sub"})) {
    Value* added = node->input(1 - operand);
    if (is_small_number(added)) {
      return inner;  // no softmax sees what is the same for all keys, those of a prefix, too
    }
    understood = understood && !is_learned_for_all_keys(added);
  }
  if (!inner && is_aten(node, {"add"}) && has_unit_alpha(node) && is_tensor(node->input(1 - operand))) {
    return node->input(1 - operand);
  }
  return copy_with(node, operand, inner ? inner : zero_like(node->input(1 - operand), scores));
}

Value* AffinePath::broadcasting_zero(const Value* scores) {
  Value* shape = graph_->insertConstant(std::vector<int64_t>{1, 1, 1, 1});
  const auto scores_shape = shapes_.shape(scores);
  if (scores_shape && scores_shape->size() == 3) {  // [B * h, S, S], to be unflattened
    Value* one = graph_->insertConstant(1);
    Value* rows = graph_->insert(c10::aten::size, {left_factor(product_), 0});
    shape = graph_->insertNode(graph_->createList(c10::IntType::get(), {rows, one, one}))->output();
  }
  Value* dtype = graph_->insert(c10::prim::dtype, {anchor_});
  Value* device = graph_->insert(c10::prim::device, {anchor_});
  return graph_->insert(c10::aten::zeros, {shape},
                        {torch::jit::NamedValue("dtype", dtype), torch::jit::NamedValue("device", device)});
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
  for (size_t i = 0; i < 2; ++i) {
    Block* block = copy->blocks()[i];
    if (is_zero[i]) {  // a side that adds nothing
      torch::jit::WithInsertPoint guard(block);
      results[i] = broadcasting_zero(branch->outputs()[output]);
    }
    block->registerOutput(results[i]);
  }
  return copy->addOutput()->setType(c10::TensorType::get());
}

}  // namespace torchgraft
