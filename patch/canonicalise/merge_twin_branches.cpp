#include <torchgraft/patch/canonicalise/merge_twin_branches.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <map>
#include <optional>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// Constants and attributes of modules. Their order among a branch's nodes means nothing.
bool is_access(const Node* node) { return node->kind() == c10::prim::Constant || node->kind() == c10::prim::GetAttr; }

std::vector<Node*> steps_of(Block* block) {
  std::vector<Node*> result;
  std::copy_if(block->nodes().begin(), block->nodes().end(), std::back_inserter(result),
               [](const Node* node) { return !is_access(node); });
  return result;
}

// Whether `node` computes the same as `other` on the same operands, sub-blocks aside.
bool same_kind(Node* node, Node* other) {
  if (node->kind() != other->kind() || node->inputs().size() != other->inputs().size() ||
      node->outputs().size() != other->outputs().size() || node->blocks().size() != other->blocks().size() ||
      node->maybeSchema() != other->maybeSchema() || node->kind() == c10::prim::SetAttr) {
    return false;
  }
  const auto names = node->attributeNames();
  if (names != other->attributeNames()) {
    return false;
  }
  return std::all_of(names.begin(), names.end(), [&](c10::Symbol name) {
    return node->kindOf(name) == torch::jit::AttributeKind::s && other->kindOf(name) == torch::jit::AttributeKind::s &&
           node->s(name) == other->s(name);
  });
}

// Whether `node` takes a value of `type` as its input `index`, also when it is printed and compiled again. A schema
// that says Any or a type variable does not tell: that of TupleIndex says Any, and the compiler refuses an Optional
// there.
bool accepts(const Node* node, size_t index, const c10::TypePtr& type) {
  const auto kind = node->kind();
  if (kind == c10::prim::unchecked_cast || kind == c10::prim::isinstance || kind == c10::aten::__is__ ||
      kind == c10::aten::__isnot__) {
    return true;
  }
  const auto* schema = node->maybeSchema();
  if (!schema || index >= schema->arguments().size()) {
    return false;
  }
  const auto& wanted = schema->arguments()[index].type();
  return wanted->kind() != c10::TypeKind::AnyType && !wanted->hasFreeVariables() && type->isSubtypeOf(*wanted);
}

// Inside `if mask is not None` TorchScript passes on a value of its own that cannot be None. Gives readers that accept
// None the original `mask`, which the twin of such a reader gets too.
void drop_idle_refinements(const std::shared_ptr<Graph>& graph) {
  for_each_node(graph->block(), [](Node* node) {
    if (node->kind() != c10::prim::unchecked_cast) {
      return;
    }
    Value* source = node->input(0);
    const auto& uses = node->output()->uses();
    const bool idle = std::all_of(uses.begin(), uses.end(), [&](const torch::jit::Use& use) {
      return accepts(use.user, use.offset, source->type());
    });
    if (idle) {
      node->output()->replaceAllUsesWith(source);
      node->destroy();
    }
  });
}

// Compares the two branches of one `if`, and then merges them.
class Twins {
 public:
  explicit Twins(Node* branch) : branch_(branch), left_(branch->blocks()[0]), right_(branch->blocks()[1]) {}

  bool match() { return match_blocks(left_, right_); }
  void merge();

 private:
  // An input of a node of the left branch, or an output of the branch, that is another value on the right. `node` is
  // null for an output of the branch.
  struct Difference {
    Node* node;
    size_t index;
    Value* left;
    Value* right;
    c10::TypePtr type;
  };

  bool match_blocks(Block* left, Block* right);
  bool match_nodes(Node* left, Node* right);
  bool same_value(Value* left, Value* right);
  bool match_operand(Node* node, size_t index, Value* left, Value* right);
  bool is_available(const Value* value) const;
  Value* select(const Difference& difference);

  Node* branch_;
  Block* left_;
  Block* right_;
  std::map<Value*, Value*> right_of_;
  std::vector<Difference> differences_;
  std::map<std::pair<Value*, Value*>, Value*> selected_;
};

bool Twins::same_value(Value* left, Value* right) {
  if (const auto twin = right_of_.find(left); twin != right_of_.end()) {
    return twin->second == right;
  }
  if (left == right) {
    return true;
  }
  const Node* a = left->node();
  const Node* b = right->node();
  if (a->kind() == c10::prim::GetAttr && b->kind() == c10::prim::GetAttr) {
    return a->s(c10::attr::name) == b->s(c10::attr::name) && same_value(a->input(0), b->input(0));
  }
  const auto x = torch::jit::toIValue(left);
  const auto y = torch::jit::toIValue(right);
  const bool plain = x && y && *left->type() == *right->type() && !x->isTensor() && !x->isObject();
  return plain && *x == *y;
}

// Whether `value` can be read before the `if`: it is a constant, or comes from before.
bool Twins::is_available(const Value* value) const {
  return value->node()->kind() == c10::prim::Constant ||
         (!is_inside(value->node(), left_) && !is_inside(value->node(), right_));
}

// `node` null: an output of the branch.
bool Twins::match_operand(Node* node, size_t index, Value* left, Value* right) {
  if (same_value(left, right)) {
    return true;
  }
  if (!is_available(left) || !is_available(right)) {
    return false;
  }
  const auto type = c10::unifyTypes(left->type(), right->type());
  if (!type || (node && **type != *left->type() && !accepts(node, index, *type))) {
    return false;
  }
  differences_.push_back({node, index, left, right, *type});
  return true;
}

bool Twins::match_nodes(Node* left, Node* right) {
  if (!same_kind(left, right)) {
    return false;
  }
  for (size_t i = 0; i < left->inputs().size(); ++i) {
    if (!match_operand(left, i, left->input(i), right->input(i))) {
      return false;
    }
  }
  for (size_t i = 0; i < left->outputs().size(); ++i) {
    if (*left->outputs()[i]->type() != *right->outputs()[i]->type()) {
      return false;
    }
    right_of_[left->outputs()[i]] = right->outputs()[i];
  }
  for (size_t i = 0; i < left->blocks().size(); ++i) {
    if (!match_blocks(left->blocks()[i], right->blocks()[i])) {
      return false;
    }
  }
  return true;
}

bool Twins::match_blocks(Block* left, Block* right) {
  const auto steps = steps_of(left);
  const auto others = steps_of(right);
  if (steps.size() != others.size() || left->inputs().size() != right->inputs().size() ||
      left->outputs().size() != right->outputs().size()) {
    return false;
  }
  for (size_t i = 0; i < left->inputs().size(); ++i) {
    right_of_[left->inputs()[i]] = right->inputs()[i];
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    if (!match_nodes(steps[i], others[i])) {
      return false;
    }
  }
  for (size_t i = 0; i < left->outputs().size(); ++i) {
    const bool is_outermost = left == left_;
    const bool same = is_outermost ? match_operand(nullptr, i, left->outputs()[i], right->outputs()[i])
                                   : same_value(left->outputs()[i], right->outputs()[i]);
    if (!same) {
      return false;
    }
  }
  return true;
}

// An `if` on the same condition that only chooses between the two.
Value* Twins::select(const Difference& difference) {
  Value*& result = selected_[{difference.left, difference.right}];
  if (result) {
    return result;
  }
  Graph* graph = branch_->owningGraph();
  Node* choice = graph->create(c10::prim::If, {branch_->input()}, 1)->insertBefore(branch_);
  for (Value* value : {difference.left, difference.right}) {
    Block* block = choice->addBlock();
    if (value->node()->kind() == c10::prim::Constant) {
      Node* copy = graph->createClone(value->node(), [](Value* v) { return v; });
      value = block->appendNode(copy)->output();
    }
    block->registerOutput(value);
  }
  result = choice->output()->setType(difference.type);
  return result;
}

void Twins::merge() {
  for (const Difference& difference : differences_) {
    Value* selected = select(difference);
    if (difference.node) {
      difference.node->replaceInput(difference.index, selected);
    } else {
      left_->replaceOutput(difference.index, selected);
    }
  }
  for (Node* node : std::vector<Node*>(left_->nodes().begin(), left_->nodes().end())) {
    node->moveBefore(branch_);
  }
  const std::vector<Value*> outputs(left_->outputs().begin(), left_->outputs().end());
  replace_node(branch_, outputs);
}

bool has_linear_maps(Node* branch) {
  bool found = false;
  for (Block* block : branch->blocks()) {
    for_each_node(
        block, [&](Node* node) { found = found || is_linear(node) || is_aten(node, {"matmul", "einsum", "addmm"}); });
  }
  return found;
}

}  // namespace

void merge_twin_branches(const std::shared_ptr<Graph>& graph) {
  drop_idle_refinements(graph);
  // Inner branches come first: two sides of an outer one may be twins only once their inner branches are merged.
  for_each_node(graph->block(), [](Node* node) {
    if (node->kind() != c10::prim::If || !has_linear_maps(node)) {
      return;
    }
    if (Twins twins(node); twins.match()) {
      twins.merge();
    }
  });
}

}  // namespace torchgraft
