#include <torchgraft/patch/canonicalise/hoist_score_product.h>

#include <torchgraft/patch/canonicalise/score_path.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <optional>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// bmm(q, k), or baddbmm(bias, q, k) with beta and alpha 1.
struct Product {
  Value* query = nullptr;
  Value* key = nullptr;
  Value* bias = nullptr;
};

std::optional<Product> product_of(Value* value) {
  Node* node = value->node();
  const bool adds = is_aten(node, {"baddbmm"}) && constant_double(node->namedInput("beta")) == 1.0 &&
                    constant_double(node->namedInput("alpha")) == 1.0;
  if (!adds && !is_aten(node, {"bmm"})) {
    return std::nullopt;
  }
  return Product{left_factor(node), right_factor(node), adds ? node->namedInput("self") : nullptr};
}

// Whether `value`, which a node in `branch` reads, exists before `branch`.
bool comes_before(const Value* value, const Node* branch) { return is_inside(branch, value->node()->owningBlock()); }

// One value before `branch` for both `left` and `right`: they are the same value, or the same transpose of one value.
// Null when they are not.
Value* common_value(Value* left, Value* right, Node* branch) {
  if (left == right) {
    return comes_before(left, branch) ? left : nullptr;
  }
  Node* a = left->node();
  const Node* b = right->node();
  const bool both = is_aten(a, {"transpose"}) && is_aten(b, {"transpose"}) &&
                    a->namedInput("self") == b->namedInput("self") && comes_before(a->namedInput("self"), branch) &&
                    constant_int(a->namedInput("dim0")) && constant_int(a->namedInput("dim1")) &&
                    constant_int(a->namedInput("dim0")) == constant_int(b->namedInput("dim0")) &&
                    constant_int(a->namedInput("dim1")) == constant_int(b->namedInput("dim1"));
  if (!both) {
    return nullptr;
  }
  Graph* graph = branch->owningGraph();
  torch::jit::WithInsertPoint guard(branch);
  return graph->insert(c10::aten::transpose, {a->namedInput("self"), *constant_int(a->namedInput("dim0")),
                                              *constant_int(a->namedInput("dim1"))});
}

void hoist_output(Node* branch, size_t output, const Writes& writes) {
  std::vector<Product> products;
  for (Block* block : branch->blocks()) {
    const auto product = product_of(block->outputs()[output]);
    // Queries and keys are read before the branch, the bias at its end.
    if (!product || writes.reach(product->query) || writes.reach(product->key) ||
        (product->bias && writes.reach(product->bias))) {
      return;
    }
    products.push_back(*product);
  }
  Value* query = common_value(products[0].query, products[1].query, branch);
  Value* key = query ? common_value(products[0].key, products[1].key, branch) : nullptr;
  if (!key) {
    return;
  }
  Graph* graph = branch->owningGraph();
  Value* scores = nullptr;
  {
    torch::jit::WithInsertPoint guard(branch);
    scores = graph->insert(c10::aten::bmm, {query, key});
  }
  for (size_t i = 0; i < products.size(); ++i) {
    Block* block = branch->blocks()[i];
    torch::jit::WithInsertPoint guard(block);
    Value* bias = products[i].bias;
    block->replaceOutput(output, bias ? graph->insert(c10::aten::add, {scores, bias}) : scores);
  }
}

}  // namespace

void hoist_score_product(const std::shared_ptr<Graph>& graph) {
  const Writes writes(graph);
  for_each_node(graph->block(), [&](Node* node) {
    for (size_t i = 0; node->kind() == c10::prim::If && i < node->outputs().size(); ++i) {
      hoist_output(node, i, writes);
    }
  });
}

}  // namespace torchgraft
