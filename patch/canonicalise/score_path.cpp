#include <torchgraft/patch/canonicalise/score_path.h>

#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace torchgraft {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

bool is_product(const Node* node) { return is_aten(node, {"matmul", "bmm", "baddbmm"}); }

Value* left_factor(Node* product) { return product->namedInput(is_aten(product, {"baddbmm"}) ? "batch1" : "self"); }

Value* right_factor(Node* product) {
  return product->namedInput(is_aten(product, {"baddbmm"}) ? "batch2" : is_aten(product, {"bmm"}) ? "mat2" : "other");
}

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
    const auto sizes = resolve_constant(node->namedInput("size"));
    return sizes && sizes->toListRef().empty();
  }
  return is_aten(node, {"pow", "sqrt", "rsqrt", "reciprocal", "mul", "div", "to"}) &&
         std::all_of(node->inputs().begin(), node->inputs().end(),
                     [](const Value* input) { return !is_tensor(input) || is_number(input); });
}

// A parameter, a buffer, or what is computed from those and numbers, element by element.
bool is_learned(const Value* value) {
  const Node* node = value->node();
  if (!is_tensor(value)) {
    return false;
  }
  if (node->kind() == c10::prim::GetAttr || node->kind() == c10::prim::Constant) {
    return true;
  }
  return is_aten(node,
                 {"exp",   "softplus", "sigmoid", "tanh", "abs",        "clamp",     "clamp_min", "clamp_max", "sqrt",
                  "rsqrt", "square",   "log",     "relu", "reciprocal", "neg",       "add",       "sub",       "mul",
                  "div",   "pow",      "to",      "view", "reshape",    "unsqueeze", "squeeze"}) &&
         !is_in_place(node) && std::all_of(node->inputs().begin(), node->inputs().end(), [](const Value* input) {
           return !is_tensor(input) || is_number(input) || is_learned(input);
         });
}

namespace {

// Whether `keys` are what a linear map makes of the graph's inputs.
bool are_mapped_tokens(Value* keys) {
  const auto linears = nearest_linears(keys);
  return std::any_of(linears.begin(), linears.end(),
                     [](Node* linear) { return depends_on_inputs(linear_input(linear)); });
}

// Of two products that are added, that of queries and keys: the other one is a relative position bias, of queries and
// parameters. Null when that is not clear.
Node* product_with_keys(Node* left, Node* right) {
  for (bool (*is_of_tokens)(Value*) : {&depends_on_inputs, &are_mapped_tokens}) {
    const bool left_is = is_of_tokens(right_factor(left));
    if (left_is != is_of_tokens(right_factor(right))) {
      return left_is ? left : right;
    }
  }
  return nullptr;
}

// The two products that `sum`, an add, sub or baddbmm, adds; null where a side has none.
std::pair<Node*, Node*> added_products(const Node* sum) {
  const bool is_baddbmm = is_aten(sum, {"baddbmm"});
  if (!is_baddbmm && !is_aten(sum, {"add", "sub"})) {
    return {};
  }
  const auto of = [&](size_t i) { return is_tensor(sum->input(i)) ? find_product(sum->input(i)) : nullptr; };
  return {of(0), is_baddbmm ? const_cast<Node*>(sum) : of(1)};
}

// The operand of the add or sub `sum` that carries the scores.
std::optional<size_t> scores_of_sum(const Node* sum) {
  const auto [left, right] = added_products(sum);
  const Node* product = !left ? right : !right || left == right ? left : product_with_keys(left, right);
  const bool can_be_right = is_aten(sum, {"add"}) && has_unit_alpha(sum);  // add(x, y, alpha) is x + alpha y
  if (!product || (product == right && product != left && !can_be_right)) {
    return std::nullopt;
  }
  return product == left ? 0 : 1;
}

}  // namespace

Value* step_factor(const Node* step) { return const_cast<Value*>(step->input(1 - score_operand(step).value())); }

Node* find_product(const Value* scores) {
  Node* node = const_cast<Value*>(scores)->node();
  if (is_product(node)) {
    Node* added = added_products(node).first;  // in front of a baddbmm
    return !added || product_with_keys(added, node) == node ? node : nullptr;
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
    const bool does_more = node->inputs().size() > 2 && !is_none(node->input(2));  // it rounds, or writes into `out`
    if (does_more) {
      return std::nullopt;
    }
    if (is_number(node->input(1)) || is_learned(node->input(1))) {
      return 0;
    }
    return is_aten(node, {"mul"}) && is_learned(node->input(0)) ? std::optional<size_t>(1) : std::nullopt;
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
  return is_aten(node, {"add", "sub"}) ? scores_of_sum(node) : std::nullopt;
}

const Node* unclear_sum(const Value* scores) {
  const Node* node = scores->node();
  const auto [left, right] = added_products(node);
  if (left && right && left != right && !product_with_keys(left, right)) {
    return node;
  }
  const auto operand = is_product(node) ? std::nullopt : score_operand(node);
  return operand ? unclear_sum(node->input(*operand)) : nullptr;
}

namespace {

void walk(const Value* scores, const Node* product, std::optional<double> slope, const StepVisitor& visit) {
  Node* node = const_cast<Value*>(scores)->node();
  if (node == product) {
    return;
  }
  visit(node, slope);
  if (node->kind() == c10::prim::If) {
    for (Block* block : node->blocks()) {
      walk(block->outputs()[scores->offset()], product, slope, visit);
    }
    return;
  }
  if (is_aten(node, {"mul", "div"})) {
    const auto factor = constant_double(step_factor(node));
    const bool known = slope && factor;
    slope = !known ? std::nullopt : std::optional(is_aten(node, {"div"}) ? *slope / *factor : *slope * *factor);
  }
  walk(node->input(score_operand(node).value()), product, slope, visit);
}

}  // namespace

void for_each_step(const Value* scores, const Node* product, const StepVisitor& visit) {
  walk(scores, product, 1.0, visit);
}

torch::jit::ValueSet path_values(const Value* scores, const Node* product) {
  torch::jit::ValueSet values;
  const auto add = [&](const Node* node) {
    for (at::ArrayRef<const Value*> group : {node->inputs(), node->outputs()}) {
      std::copy_if(group.begin(), group.end(), std::inserter(values, values.end()), is_tensor);
    }
  };
  for_each_step(scores, product, [&](Node* step, std::optional<double>) {
    add(step);
    for (Block* block : step->blocks()) {
      for_each_node(block, add);
    }
  });
  values.insert(product->output());
  return values;
}

const Node* what_must_run_once(const Value* scores, const Node* product) {
  const Node* found = nullptr;
  for_each_step(scores, product, [&](Node* step, std::optional<double>) {
    for (Block* block : step->blocks()) {
      for_each_node(block, [&](Node* node) { found = !found && must_run_once(node) ? node : found; });
    }
  });
  return found;
}

}  // namespace torchgraft
