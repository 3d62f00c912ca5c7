#include <torchgraft/patch/canonicalise/may_be_attention.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <unordered_set>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

bool normalizes(const Node* node) {
  return is_aten(node, {"layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"});
}

bool may_hold_tensors(const c10::Type& type) {
  const auto kind = type.kind();
  const bool is_container = kind == c10::TypeKind::ListType || kind == c10::TypeKind::TupleType ||
                            kind == c10::TypeKind::DictType || kind == c10::TypeKind::OptionalType;
  const auto contained = type.containedTypes();
  return type.isSubtypeOf(*c10::TensorType::get()) ||
         (is_container && std::any_of(contained.begin(), contained.end(),
                                      [](const c10::TypePtr& element) { return may_hold_tensors(*element); }));
}

bool carries_tensors(const Value* value) { return may_hold_tensors(*value->type()); }

// The inputs of `node` whose elements go into its result.
std::vector<Value*> data_inputs(Node* node) {
  const bool takes_form = is_aten(node, {"type_as", "expand_as", "view_as", "reshape_as"});
  // Indices choose elements: an expert's weights do not become activations by being chosen.
  const bool chooses = is_aten(node, {"index", "index_select", "gather", "take", "take_along_dim"});
  const bool is_new =
      is_aten(node, {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"});
  std::vector<Value*> result;
  for (Value* input : node->inputs().slice(0, is_new ? 0 : takes_form || chooses ? 1 : node->inputs().size())) {
    if (carries_tensors(input)) {
      result.push_back(input);
    }
  }
  for (torch::jit::Block* block : node->blocks()) {
    std::copy_if(block->outputs().begin(), block->outputs().end(), std::back_inserter(result), carries_tensors);
  }
  return result;
}

// Goes from `value` back over what it is computed from. True as soon as `found` is; not beyond nodes that `stops`
// names.
bool search_back(Value* value, const std::function<bool(Value*)>& found, const std::function<bool(Node*)>& stops) {
  std::unordered_set<Value*> seen;
  std::deque<Value*> queue = {value};
  while (!queue.empty()) {
    Value* current = queue.front();
    queue.pop_front();
    if (!seen.insert(current).second) {
      continue;
    }
    if (found(current)) {
      return true;
    }
    if (!stops(current->node())) {
      const auto inputs = data_inputs(current->node());
      queue.insert(queue.end(), inputs.begin(), inputs.end());
    }
  }
  return false;
}

// True for what a softmax made, seen through dropout and layout.
bool is_probability(Value* value) {
  Node* node = value->node();
  while (is_layout(node) || is_aten(node, {"dropout", "expand"})) {
    node = node->input(0)->node();
  }
  return is_softmax(node);
}

// Compares each of some activations with each of others.
bool compares_activations(Node* node) {
  if (is_aten(node, {"add", "sub"})) {  // additive attention
    return std::all_of(node->inputs().begin(), node->inputs().begin() + 2, [](Value* operand) {
      return is_aten(operand->node(), {"unsqueeze", "expand"}) && depends_on_inputs(operand);
    });
  }
  if (!is_aten(node, {"matmul", "mm", "bmm", "baddbmm", "einsum", "cdist"})) {
    return false;
  }
  std::vector<Value*> operands = data_inputs(node);
  if (operands.size() == 1 && operands[0]->node()->kind() == c10::prim::ListConstruct) {
    operands = data_inputs(operands[0]->node());
  }
  return std::none_of(operands.begin(), operands.end(), is_probability) &&
         std::count_if(operands.begin(), operands.end(), depends_on_inputs) >= 2;
}

// The values that get what `use` reads: the user's results, and those of blocks that it goes into or comes out of.
std::vector<Value*> carried_to(const torch::jit::Use& use) {
  Node* user = use.user;
  std::vector<Value*> result(user->outputs().begin(), user->outputs().end());
  for (torch::jit::Block* block : user->blocks()) {
    result.insert(result.end(), block->inputs().begin(), block->inputs().end());
  }
  Node* owner = user->owningBlock()->owningNode();
  if (user->kind() == c10::prim::Return && owner != nullptr) {
    result.insert(result.end(), owner->outputs().begin(), owner->outputs().end());
    for (torch::jit::Block* block : owner->blocks()) {  // a loop's next turn
      result.insert(result.end(), block->inputs().begin(), block->inputs().end());
    }
  }
  return result;
}

// Whether the rows of `product` may be tokens and its columns not: a layer of an expert, whose number of columns stands
// in its weights.
bool has_columns_of_weights(const Node* product, SymbolicShapes& shapes) {
  const auto shape = shapes.shape(product->output());
  return shape && shape->size() >= 2 && shape->back().is_constant() && !(*shape)[shape->size() - 2].is_constant();
}

bool is_read_by_a_layer(Value* probabilities) {
  std::unordered_set<const Value*> seen;
  std::deque<Value*> queue = {probabilities};
  while (!queue.empty()) {
    Value* current = queue.front();
    queue.pop_front();
    for (const torch::jit::Use& use : current->uses()) {
      const bool is_product =
          is_linear(use.user) || is_aten(use.user, {"matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum"});
      if (is_product || normalizes(use.user) || is_aten(use.user, {"scaled_dot_product_attention"})) {
        return true;
      }
      for (Value* output : carried_to(use)) {
        if (carries_tensors(output) && seen.insert(output).second) {
          queue.push_back(output);
        }
      }
    }
  }
  return false;
}

}  // namespace

bool depends_on_inputs(Value* value) {
  const auto is_input = [](Value* found) {
    return found->node()->kind() == c10::prim::Param && found->type()->kind() != c10::TypeKind::ClassType;
  };
  return search_back(value, is_input, [](Node* node) { return node->kind() == c10::prim::GetAttr; });
}

bool depends_on(Value* value, const std::vector<Value*>& sources) {
  const auto is_source = [&](Value* found) {
    return std::find(sources.begin(), sources.end(), found) != sources.end();
  };
  return search_back(value, is_source, [](Node* node) { return node->kind() == c10::prim::GetAttr; });
}

Node* activation_of_scores(Node* product, SymbolicShapes& shapes) {
  if (!is_aten(product, {"matmul", "bmm"})) {
    return nullptr;
  }
  Node* activation = nullptr;
  Node* node = product->namedInput("self")->node();
  while (!is_aten(node, {"matmul", "bmm", "baddbmm"})) {
    // exp: of a softmax with another sum below it, as 1 + sum.
    const bool activates = is_aten(
        node, {"relu",        "relu6",     "sigmoid", "square",    "silu", "gelu",       "softplus", "elu",
               "celu",        "selu",      "mish",    "tanh",      "pow",  "leaky_relu", "hardtanh", "hardswish",
               "hardsigmoid", "threshold", "clamp",   "clamp_min", "abs",  "exp",        "exp2"});
    const bool carries = is_layout(node) || is_elementwise(node) ||
                         is_aten(node, {"dropout", "mul", "div", "add", "sub", "masked_fill"});
    if (!activates && !carries) {
      return nullptr;
    }
    activation = activates ? node : activation;
    node = node->input(0)->node();
  }
  const bool mixes = activation && compares_activations(node) && depends_on_inputs(product->input(1)) &&
                     !has_columns_of_weights(node, shapes);
  return mixes ? activation : nullptr;
}

bool may_be_attention(Node* softmax) {
  // Scores end where another layer begins.
  const auto stops = [](Node* node) {
    return is_softmax(node) || normalizes(node) || is_aten(node, {"scaled_dot_product_attention", "embedding"});
  };
  const auto found = [](Value* value) { return compares_activations(value->node()); };
  return is_read_by_a_layer(softmax->output()) && search_back(softmax->namedInput("self"), found, stops);
}

}  // namespace torchgraft
