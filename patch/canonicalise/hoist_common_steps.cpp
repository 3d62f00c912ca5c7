#include <torchgraft/patch/canonicalise/hoist_common_steps.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool writes_anything(Block* block) {
  bool result = false;
  for_each_node(block, [&](Node* node) {
    result = result || is_writer(node) || node->kind() == c10::prim::SetAttr || node->kind() == c10::prim::fork;
  });
  return result;
}

// Whether `node` gives the same at an earlier time, on the same operands.
bool can_run_before(const Node* node) {
  const auto kind = node->kind();
  const bool is_known = kind.is_aten() || kind == c10::prim::GetAttr || kind == c10::prim::Constant ||
                        kind == c10::prim::ListConstruct || kind == c10::prim::ListUnpack ||
                        kind == c10::prim::TupleConstruct || kind == c10::prim::TupleUnpack ||
                        kind == c10::prim::TupleIndex;
  return is_known && node->blocks().empty() && !must_run_once(node) && !only_complains(node) &&
         !draws_random_numbers(node);
}

bool can_be_compared(const c10::IValue& value) {
  const bool is_list_of_others = value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList();
  return !value.isTensor() && !value.isObject() && !value.isTuple() && !value.isGenericDict() && !is_list_of_others;
}

bool are_same_constants(const Node* left, const Node* right) {
  const auto a = torch::jit::toIValue(left->output());
  const auto b = torch::jit::toIValue(right->output());
  return a && b && can_be_compared(*a) && can_be_compared(*b) && *a == *b;
}

// The steps of two blocks that compute the same.
class CommonSteps {
 public:
  explicit CommonSteps(Node* branch) : branch_(branch), left_(branch->blocks()[0]), right_(branch->blocks()[1]) {}

  void find();
  void hoist();
  bool hold_a_linear_map() const {
    return std::any_of(pairs_.begin(), pairs_.end(), [](const auto& pair) { return is_linear(pair.first); });
  }

 private:
  bool are_same(Node* left, Node* right) const;

  Node* branch_;
  Block* left_;
  Block* right_;
  std::vector<std::pair<Node*, Node*>> pairs_;  // in execution order
  std::map<const Value*, const Value*> right_of_;
};

bool CommonSteps::are_same(Node* left, Node* right) const {
  if (left->kind() != right->kind() || left->inputs().size() != right->inputs().size() ||
      left->outputs().size() != right->outputs().size() || left->maybeSchema() != right->maybeSchema()) {
    return false;
  }
  for (size_t i = 0; i < left->outputs().size(); ++i) {
    if (*left->outputs()[i]->type() != *right->outputs()[i]->type()) {
      return false;
    }
  }
  if (left->kind() == c10::prim::Constant) {
    return are_same_constants(left, right);
  }
  if (left->kind() == c10::prim::GetAttr && left->s(c10::attr::name) != right->s(c10::attr::name)) {
    return false;
  }
  for (size_t i = 0; i < left->inputs().size(); ++i) {
    const Value* operand = left->input(i);
    const auto twin = right_of_.find(operand);
    const bool is_same = twin != right_of_.end() ? twin->second == right->input(i)
                                                 : operand == right->input(i) && !is_inside(operand->node(), left_);
    if (!is_same) {
      return false;
    }
  }
  return true;
}

void CommonSteps::find() {
  std::set<const Node*> taken;
  for (Node* left : left_->nodes()) {
    if (!can_run_before(left)) {
      continue;
    }
    const auto found = std::find_if(right_->nodes().begin(), right_->nodes().end(),
                                    [&](Node* right) { return !taken.count(right) && are_same(left, right); });
    if (found == right_->nodes().end()) {
      continue;
    }
    taken.insert(*found);
    pairs_.emplace_back(left, *found);
    for (size_t i = 0; i < left->outputs().size(); ++i) {
      right_of_[left->outputs()[i]] = found->outputs()[i];
    }
  }
}

void CommonSteps::hoist() {
  for (const auto& [left, right] : pairs_) {
    left->moveBefore(branch_);
    for (size_t i = 0; i < left->outputs().size(); ++i) {
      right->outputs()[i]->replaceAllUsesWith(left->outputs()[i]);
    }
  }
  for (auto pair = pairs_.rbegin(); pair != pairs_.rend(); ++pair) {
    pair->second->destroy();
  }
}

}  // namespace

void hoist_common_steps(const std::shared_ptr<Graph>& graph) {
  std::vector<Node*> branches;  // inner ones first
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == c10::prim::If) {
      branches.push_back(node);
    }
  });
  for (Node* branch : branches) {
    if (writes_anything(branch->blocks()[0]) || writes_anything(branch->blocks()[1])) {
      continue;
    }
    CommonSteps steps(branch);
    steps.find();
    if (steps.hold_a_linear_map()) {
      steps.hoist();
    }
  }
}

}  // namespace torchgraft
