#include <torchgraft/patch/canonicalise/fold_rank_checks.h>

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

constexpr const char* kRankMessage = "query should be unbatched 2D or batched 3D tensor";
constexpr int64_t kBatchedRank = 3;

// Whether no other value is the same tensor object: `value` is an argument of forward, or the result of an op that
// never returns its operand. When a caller gives one tensor twice, torch.nn computes the same on another branch.
bool is_object_of_its_own(const Value* value) {
  return value->node()->kind() == c10::prim::Param || is_linear(value->node()) ||
         is_aten(value->node(), {"transpose", "layer_norm", "add", "view", "permute"});
}

// The answer to `a is b`, which scripting asks of query, key and value; nullopt when it is not known.
std::optional<bool> are_identical(const Value* a, const Value* b) {
  if (a == b) {
    return true;
  }
  return is_tensor(a) && is_tensor(b) && is_object_of_its_own(a) && is_object_of_its_own(b) ? std::optional<bool>(false)
                                                                                            : std::nullopt;
}

// Folds the answers that are known. Returns false when there are none.
bool fold_identities(const std::shared_ptr<Graph>& graph) {
  bool found = false;
  for_each_node(graph->block(), [&](Node* node) {
    const bool is = node->kind() == c10::aten::__is__;
    if (!is && node->kind() != c10::aten::__isnot__) {
      return;
    }
    if (const auto identical = are_identical(node->namedInput("self"), node->namedInput("obj"))) {
      torch::jit::WithInsertPoint guard(node);
      node->output()->replaceAllUsesWith(graph->insertConstant(*identical == is));
      node->destroy();
      found = true;
    }
  });
  return found;
}

bool has_rank_message(Block* block) {
  bool found = false;
  for_each_node(block, [&](Node* node) {
    for (const Value* input : node->inputs()) {
      const auto constant = torch::jit::toIValue(input);
      found = found ||
              (constant && constant->isString() && constant->toStringRef().find(kRankMessage) != std::string::npos);
    }
  });
  return found;
}

// v in `if v.dim() == 3: ... else: ... raise <kRankMessage>`; null for any other node.
Value* checked_query(Node* branch) {
  const Node* test = branch->kind() == c10::prim::If ? branch->input()->node() : nullptr;
  const bool compares = test && is_aten(test, {"eq"}) && constant_int(test->input(1)) == kBatchedRank &&
                        is_aten(test->input(0)->node(), {"dim"});
  // Looks for the message last: that search visits all of the branch.
  return compares && has_rank_message(branch->blocks()[1]) ? test->input(0)->node()->input() : nullptr;
}

bool is_rearrangement(const Node* node) { return is_aten(node, {"transpose", "contiguous", "permute"}); }

// Adds `value`, and the values that it is rearranged from, through branches, to `found`: all have one rank.
void add_of_same_rank(Value* value, std::vector<Value*>& found) {
  if (std::find(found.begin(), found.end(), value) != found.end()) {
    return;
  }
  found.push_back(value);
  Node* node = value->node();
  if (is_rearrangement(node)) {
    add_of_same_rank(node->namedInput("self"), found);
  } else if (node->kind() == c10::prim::If) {
    for (Block* block : node->blocks()) {
      add_of_same_rank(block->outputs()[value->offset()], found);
    }
  }
}

// The node right behind `value`: readers of `value` may be inserted before it.
Node* node_behind(Value* value) {
  Node* node = value->node();
  return node->kind() == c10::prim::Param ? *node->owningBlock()->nodes().begin() : node->next();
}

// Replaces dim(value) by the constant rank. `asserts`: also asserts that rank, right behind `value`.
void fold_rank(Graph& graph, Value* value, bool asserts) {
  std::vector<Node*> questions;
  for (const auto& use : value->uses()) {
    if (is_aten(use.user, {"dim"})) {
      questions.push_back(use.user);
    }
  }
  if (questions.empty()) {
    return;
  }
  torch::jit::WithInsertPoint guard(node_behind(value));
  if (asserts) {
    static const auto body = compile_graph(R"python(
def check(x: Tensor):
    assert x.dim() == 3, "torchgraft: a grafted MultiheadAttention needs batched input, of rank 3"
)python",
                                           "check");
    torch::jit::insertGraph(graph, *body, {value});
  }
  for (Node* question : questions) {
    torch::jit::WithInsertPoint at(question);
    question->output()->replaceAllUsesWith(graph.insertConstant(kBatchedRank));
  }
}

}  // namespace

void fold_rank_checks(const std::shared_ptr<Graph>& graph) {
  std::vector<Value*> batched;
  for_each_node(graph->block(), [&](Node* node) {
    if (Value* query = checked_query(node)) {
      add_of_same_rank(query, batched);
    }
  });
  if (batched.empty()) {
    return;
  }
  for (Value* value : batched) {
    const bool derived = is_rearrangement(value->node()) || value->node()->kind() == c10::prim::If;
    fold_rank(*graph, value, !derived);
  }
  // When branches go away, more values turn out to be identical.
  do {
    simplify(graph);
  } while (fold_identities(graph));
}

}  // namespace torchgraft
