#include <torchgraft/patch/canonicalise/raise_norm.h>

#include <torchgraft/patch/graph/dtype_casts.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// The node that alone reads `value`, and once; null when there is none.
Node* only_user(const Value* value) {
  const auto uses = data_uses(value);
  return uses.size() == 1 ? uses[0].user : nullptr;
}

// One norm as the elementary ops spell it, up to the normalised value.
struct Core {
  Value* input = nullptr;     // what is normalised, before a cast to float32
  Value* measured = nullptr;  // what the statistics are of: `input` or its cast
  Value* scaled = nullptr;    // what they divide: `input` or its cast, perhaps minus the mean
  Node* result = nullptr;     // the mul or div that makes the normalised value
  bool centred = false;       // layer norm
  double eps = 0.0;
};

// What follows the normalised value and belongs to the norm, in order: casts, the weight, the bias.
struct Tail {
  std::vector<Node*> steps;
  Value* weight = nullptr;
  Value* bias = nullptr;
};

class NormRaiser {
 public:
  NormRaiser(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module)
      : graph_(graph), shapes_(module), writes_(graph) {}

  void raise(Node* root);

 private:
  std::optional<Core> match(Node* root);
  bool match_statistics(Value* variance, Core& core);
  bool match_scaling(Node* root, Core& core);
  bool is_mean(const Value* value, const Value* of);
  Value* centred_on(Value* value);
  bool over_last(const Node* reduction);
  bool is_per_feature(const Value* value, const Core& core);
  Tail follow(const Core& core, Node* step);
  void rewrite(const Core& core, const Tail& tail);

  std::shared_ptr<Graph> graph_;
  SymbolicShapes shapes_;
  Writes writes_;
};

// mean(x, dim, keepdim) and var(x, dim, ..., keepdim) over the last dimension, which stays with size 1.
bool NormRaiser::over_last(const Node* reduction) {
  const auto dims = resolve_constant(reduction->namedInput("dim"));
  std::optional<int64_t> dim;
  if (dims && dims->isIntList() && dims->toIntVector().size() == 1) {
    dim = dims->toIntVector()[0];
  } else if (const Node* list = reduction->namedInput("dim")->node();
             list->kind() == c10::prim::ListConstruct && list->inputs().size() == 1) {
    dim = constant_int(list->input(0));
  }
  const bool is_mean = is_aten(reduction, {"mean"});
  const auto keeps = resolve_constant(reduction->namedInput("keepdim"));
  if (!dim || !keeps || !keeps->isBool() || !keeps->toBool() || (is_mean && !is_none(reduction->namedInput("dtype")))) {
    return false;
  }
  const auto shape = shapes_.shape(reduction->namedInput("self"));
  return *dim == -1 || (shape && *dim == static_cast<int64_t>(shape->size()) - 1);
}

bool NormRaiser::is_mean(const Value* value, const Value* of) {
  const Node* node = value->node();
  return is_aten(node, {"mean"}) && node->inputs().size() == 4 && node->namedInput("self") == of && over_last(node);
}

// x for x - mean(x).
Value* NormRaiser::centred_on(Value* value) {
  Node* node = value->node();
  const bool is_difference =
      is_aten(node, {"sub"}) && !is_in_place(node) && is_tensor(node->namedInput("other")) && has_unit_alpha(node);
  return is_difference && is_mean(node->namedInput("other"), node->namedInput("self")) ? node->namedInput("self")
                                                                                       : nullptr;
}

bool is_biased_variance(const Node* node) {
  if (!is_aten(node, {"var"}) || node->inputs().size() != 4) {
    return false;
  }
  const auto correction = resolve_constant(node->input(2));  // a number, or the flag `unbiased`
  return correction && ((correction->isBool() && !correction->toBool()) || constant_double(node->input(2)) == 0.0);
}

// Whether `node` squares its first input.
bool is_square(const Node* node) {
  if (is_in_place(node)) {
    return false;  // the square has replaced its input
  }
  const bool is_power = is_aten(node, {"pow"}) && is_tensor(node->output());  // numbers have powers, too
  return (is_power && constant_double(node->namedInput("exponent")) == 2.0) || is_aten(node, {"square"}) ||
         (is_aten(node, {"mul"}) && node->input(0) == node->input(1));
}

// mean(x^2), mean((x - mean(x))^2) or var(x).
bool NormRaiser::match_statistics(Value* variance, Core& core) {
  Node* node = variance->node();
  if (is_biased_variance(node) && over_last(node)) {
    core.measured = node->namedInput("self");
    core.centred = true;
    return true;
  }
  if (!is_aten(node, {"mean"}) || node->inputs().size() != 4 || !over_last(node)) {
    return false;
  }
  Node* square = node->namedInput("self")->node();
  if (!is_square(square) || data_uses(square->output()).size() != 1) {
    return false;
  }
  Value* base = square->namedInput("self");
  Value* uncentred = centred_on(base);
  core.measured = uncentred ? uncentred : base;
  core.centred = uncentred != nullptr;
  return true;
}

// From rsqrt(v), reciprocal(sqrt(v)) or sqrt(v) to the product or quotient with the input.
bool NormRaiser::match_scaling(Node* root, Core& core) {
  const bool by_power = is_aten(root, {"pow"});
  bool inverted = is_aten(root, {"rsqrt"}) || (by_power && constant_double(root->namedInput("exponent")) == -0.5);
  Value* statistics = root->output();
  Node* user = only_user(statistics);
  if (user && !inverted && is_aten(user, {"reciprocal"})) {
    inverted = true;
    statistics = user->output();
    user = only_user(statistics);
  }
  const bool applies =
      user && (inverted ? is_aten(user, {"mul"}) : is_aten(user, {"div"}) && user->inputs().size() == 2);
  if (!applies || user->owningBlock() != root->owningBlock() || is_in_place(user)) {
    return false;
  }
  const size_t at = user->input(0) == statistics ? 0 : 1;
  if (!inverted && at == 0) {
    return false;
  }
  core.result = user;
  core.scaled = user->input(1 - at);
  if (!is_tensor(core.scaled)) {
    return false;
  }
  Value* uncentred = centred_on(strip_casts(core.scaled));
  Value* base = core.centred ? uncentred : core.scaled;
  return base && strip_casts(base) == strip_casts(core.measured);
}

// Whether only this norm reads the mean and the centred input. Both may be there twice.
bool is_private(const Core& core) {
  if (!core.centred) {
    return true;
  }
  const Node* difference = strip_casts(core.scaled)->node();
  const auto inside = [&](const torch::jit::Use& use) {
    return use.user == core.result || is_square(use.user) || is_dtype_cast(use.user) || is_cast_like(use.user);
  };
  const auto differences = data_uses(difference->output());
  const auto means = data_uses(difference->namedInput("other"));
  return std::all_of(differences.begin(), differences.end(), inside) &&
         std::all_of(means.begin(), means.end(), [&](const torch::jit::Use& use) {
           return is_aten(use.user, {"sub"}) && use.user->namedInput("self") == difference->namedInput("self") &&
                  use.offset == 1;
         });
}

std::optional<Core> NormRaiser::match(Node* root) {
  Node* sum = root->namedInput("self")->node();
  if (!is_aten(sum, {"add"}) || !has_unit_alpha(sum) || !only_user(sum->output())) {
    return std::nullopt;
  }
  const auto eps = constant_double(sum->namedInput("other"));
  Core core;
  if (!eps || !only_user(sum->namedInput("self")) || !match_statistics(sum->namedInput("self"), core) ||
      !match_scaling(root, core) || !is_private(core)) {
    return std::nullopt;
  }
  core.eps = *eps;
  // The norm computes in float32 by itself, so a cast to float32 goes away; any other cast stays.
  Node* cast = core.measured->node();
  const bool to_float =
      is_dtype_cast(cast) && constant_int(cast->namedInput("dtype")) == static_cast<int64_t>(at::kFloat);
  core.input = to_float ? cast->namedInput("self") : core.measured;
  return core;
}

// Whether `node` is an `if` like `if 16 bits: x = x.to(...)`: both blocks yield `value`, cast or not.
bool is_conditional_cast(Node* node, const Value* value) {
  if (!node || node->kind() != c10::prim::If || node->outputs().size() != 1) {
    return false;
  }
  const auto blocks = node->blocks();
  return std::all_of(blocks.begin(), blocks.end(),
                     [&](Block* block) { return strip_casts(block->outputs()[0]) == value; });
}

// The nodes that read `value`, once each; a conditional cast of it counts as one node.
std::vector<Node*> readers(Value* value) {
  std::vector<Node*> result;
  for (const auto& use : data_uses(value)) {
    Block* block = use.user->owningBlock();
    Node* node = is_conditional_cast(block->owningNode(), value) ? block->owningNode() : use.user;
    if (std::find(result.begin(), result.end(), node) == result.end()) {
      result.push_back(node);
    }
  }
  return result;
}

bool NormRaiser::is_per_feature(const Value* value, const Core& core) {
  const auto shape = is_tensor(value) ? shapes_.shape(value) : std::nullopt;
  if (!shape || shape->size() != 1 || !shape->front().is_constant()) {
    return false;
  }
  const auto input = shapes_.shape(core.input);
  return !input || input->empty() || !input->back().is_constant() || input->back() == shape->front();
}

// The steps from `step`, a reader of the normalised value, as long as each is the only reader of the one before.
Tail NormRaiser::follow(const Core& core, Node* step) {
  Tail tail;
  Value* current = core.result->output();
  while (step && step->owningBlock() == core.result->owningBlock()) {
    const bool like_input = is_cast_like(step) && step->namedInput("self") == current &&
                            strip_casts(step->namedInput("other")) == strip_casts(core.input);
    const bool casts = like_input || (is_dtype_cast(step) && step->namedInput("self") == current) ||
                       is_conditional_cast(step, current);
    const bool scales = is_aten(step, {"mul"}) && !tail.weight && !tail.bias;
    const bool shifts = is_aten(step, {"add"}) && core.centred && !tail.bias && has_unit_alpha(step);
    if ((!casts && !scales && !shifts) || is_in_place(step)) {
      break;
    }
    if (!casts) {
      Value* operand = step->input(step->input(0) == current ? 1 : 0);
      if (operand == current || !is_per_feature(operand, core)) {
        break;
      }
      (scales ? tail.weight : tail.bias) = operand;
    }
    tail.steps.push_back(step);
    current = step->output();
    const auto next = readers(current);
    step = next.size() == 1 ? next.front() : nullptr;
  }
  return tail;
}

// Replaces the last step by the norm, and by the cast that its result may need.
void NormRaiser::rewrite(const Core& core, const Tail& tail) {
  Value* sized = tail.weight ? tail.weight : tail.bias ? tail.bias : core.input;
  const auto shape = shapes_.shape(sized);
  if (!shape || shape->empty() || !shape->back().is_constant()) {
    return;  // a norm without weights of an input of unknown width
  }
  for (const Value* read : {core.input, tail.weight, tail.bias}) {
    if (read && writes_.reach(read)) {
      return;  // the norm reads it where the last step stands
    }
  }
  Value* old = (tail.steps.empty() ? core.result : tail.steps.back())->output();
  torch::jit::WithInsertPoint guard(old->node()->next());
  Value* none = graph_->insertConstant(c10::IValue());
  Value* sizes = graph_->insertConstant(std::vector<int64_t>{shape->back().factor});
  Value* weight = tail.weight ? tail.weight : none;
  Value* norm = core.centred ? graph_->insert(c10::aten::layer_norm,
                                              {core.input, sizes, weight, tail.bias ? tail.bias : none, core.eps, true})
                             : graph_->insert(c10::Symbol::aten("rms_norm"), {core.input, sizes, weight, core.eps});
  ResultType type(*graph_, norm, core.input);
  Value* scaled = centred_on(core.scaled);
  type.cast_like(scaled ? scaled : core.scaled);
  type.promote(core.measured);
  Value* before = core.result->output();
  Value* result = norm;
  for (Node* step : tail.steps) {
    if (step->kind() == c10::prim::If) {
      result = type.apply();
      Node* copy = graph_->createClone(step, [&](Value* v) { return v == before ? result : v; });
      result = graph_->insertNode(copy)->output();
      type = ResultType(*graph_, result, result);
    } else if (is_dtype_cast(step) || is_cast_like(step)) {
      type.cast(step);
    } else {
      type.promote(step->input(step->input(0) == before ? 1 : 0));
    }
    before = step->output();
  }
  old->replaceAllUsesWith(type.apply());
}

void NormRaiser::raise(Node* root) {
  const auto core = match(root);
  if (!core) {
    return;
  }
  // Several weights may share the normalised value, once common subexpressions are one.
  std::vector<Tail> tails;
  bool is_read_as_it_is = false;
  for (Node* reader : readers(core->result->output())) {
    tails.push_back(follow(*core, reader));
    if (tails.back().steps.empty()) {
      tails.pop_back();
      is_read_as_it_is = true;
    }
  }
  for (const Tail& tail : tails) {
    rewrite(*core, tail);
  }
  if (is_read_as_it_is) {
    rewrite(*core, {});
  }
}

}  // namespace

void raise_norm(const std::shared_ptr<Graph>& graph, const torch::jit::Module& module) {
  std::vector<Node*> roots;
  for_each_node(graph->block(), [&](Node* node) {
    if (!is_aten(node, {"rsqrt", "sqrt", "pow"}) || !is_tensor(node->output())) {  // numbers have roots, too
      return;
    }
    if (!is_aten(node, {"pow"}) || std::abs(constant_double(node->namedInput("exponent")).value_or(0.0)) == 0.5) {
      roots.push_back(node);
    }
  });
  NormRaiser raiser(graph, module);
  for (Node* root : roots) {
    raiser.raise(root);
  }
  torch::jit::EliminateDeadCode(graph);  // only now, because shapes are kept by value
}

}  // namespace torchgraft
