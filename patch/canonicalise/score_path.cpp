#include <torchgraft/patch/canonicalise/score_path.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <iterator>

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

Value* step_factor(const Node* step) { return const_cast<Value*>(step->input(1 - score_operand(step).value())); }

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
