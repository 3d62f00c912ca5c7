#include <torchgraft/patch/canonicalise/unroll_loops.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <optional>
#include <unordered_map>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// Deeper than any stack of layers; a loop that runs longer generates tokens.
constexpr int64_t kMaxRuns = 256;

bool holds_attention(Block* block) {
  bool found = false;
  for_each_node(block, [&](Node* node) {
    found = found || is_aten(node, {"softmax", "_softmax", "scaled_dot_product_attention",
                                    "_native_multi_head_attention", "_transformer_encoder_layer_fwd"});
  });
  return found;
}

bool is_true(const Value* value) {
  const auto constant = torch::jit::toIValue(value);
  return constant && constant->isBool() && constant->toBool();
}

// prim::Loop(runs, enter, carried...) with the body (run, carried...) -> (continue, carried...).
std::optional<int64_t> known_runs(Node* loop) {
  if (!is_true(loop->input(1)) || !is_true(loop->blocks()[0]->outputs()[0])) {
    return std::nullopt;
  }
  if (const auto runs = constant_int(loop->input(0))) {
    return runs;
  }
  const Node* length = loop->input(0)->node();
  if (!is_aten(length, {"len"})) {
    return std::nullopt;
  }
  // A list that is only read keeps its length.
  const Value* list = length->input();
  const bool only_read = std::all_of(list->uses().begin(), list->uses().end(), [](const torch::jit::Use& use) {
    return use.user->kind() == c10::aten::__getitem__ || is_aten(use.user, {"len"});
  });
  if (list->node()->kind() == c10::prim::ListConstruct && only_read) {
    return static_cast<int64_t>(list->node()->inputs().size());
  }
  const auto constant = torch::jit::toIValue(list);
  return constant && constant->isList() && only_read ? std::optional<int64_t>(constant->toListRef().size())
                                                     : std::nullopt;
}

// Inserts `runs` copies of the body before `loop`, and replaces the results of the loop by those of the last copy.
void unroll(Graph& graph, Node* loop, int64_t runs) {
  Block* body = loop->blocks()[0];
  std::vector<Value*> carried(loop->inputs().begin() + 2, loop->inputs().end());
  torch::jit::WithInsertPoint guard(loop);
  for (int64_t run = 0; run < runs; ++run) {
    std::unordered_map<Value*, Value*> copies = {{body->inputs()[0], graph.insertConstant(run)}};
    for (size_t i = 0; i < carried.size(); ++i) {
      copies[body->inputs()[i + 1]] = carried[i];
    }
    const auto copy_of = [&](Value* value) {
      const auto found = copies.find(value);
      return found == copies.end() ? value : found->second;
    };
    for (Node* node : body->nodes()) {
      Node* copy = graph.insertNode(graph.createClone(node, copy_of));
      for (size_t i = 0; i < node->outputs().size(); ++i) {
        copies[node->outputs()[i]] = copy->outputs()[i];
      }
    }
    for (size_t i = 0; i < carried.size(); ++i) {
      carried[i] = copy_of(body->outputs()[i + 1]);
    }
  }
  replace_node(loop, carried);
}

void unroll_in_block(Graph& graph, Block* block) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it;
    const bool is_candidate = node->kind() == c10::prim::Loop && holds_attention(node->blocks()[0]);
    const auto runs = is_candidate ? known_runs(node) : std::nullopt;
    if (runs && *runs <= kMaxRuns) {
      Node* before = node->prev();  // the block's own node when `node` is the first
      unroll(graph, node, *runs);
      it = ++before->iterator();  // loops in the copies are visited in their turn
      continue;
    }
    for (Block* inner : node->blocks()) {
      unroll_in_block(graph, inner);
    }
    ++it;
  }
}

}  // namespace

void unroll_loops(const std::shared_ptr<Graph>& graph) { unroll_in_block(*graph, graph->block()); }

}  // namespace torchgraft
