#include <torchgraft/patch/sites/find_cache.h>

#include <torchgraft/patch/canonicalise/earlier_passes.h>
#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/sites/find_residual.h>

#include <algorithm>
#include <deque>
#include <unordered_set>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

bool is_projected(Value* value) { return !nearest_linears(value).empty(); }

// Computed from forward's arguments, perhaps by rotary positions or from other dtypes, but by no linear map.
bool is_kept(Value* value) { return !is_projected(value) && depends_on_inputs(value); }

bool writes_tokens(const Node* node) { return is_aten(node, {"index_copy", "index_put", "scatter", "slice_scatter"}); }

// The tensors that `node` joins along a dimension of unknown size, such as the tokens; else none.
std::vector<Value*> joined_tokens(Node* node, SymbolicShapes& shapes) {
  if (!is_aten(node, {"cat", "concat"}) || node->input(0)->node()->kind() != c10::prim::ListConstruct) {
    return {};
  }
  const auto shape = shapes.shape(node->output());
  const auto dim = shape ? position(node->namedInput("dim"), shape->size()) : std::nullopt;
  const auto parts = node->input(0)->node()->inputs();
  return dim && !(*shape)[*dim].is_constant() ? std::vector<Value*>(parts.begin(), parts.end()) : std::vector<Value*>();
}

}  // namespace

CacheSite find_cache(Value* heads, SymbolicShapes& shapes) {
  if (is_of_earlier_passes(heads)) {
    return {CacheKind::kFilled};
  }
  std::unordered_set<Value*> seen;
  std::deque<Value*> queue = {heads};
  while (!queue.empty()) {
    Value* current = queue.front();
    queue.pop_front();
    Node* node = current->node();
    if (!seen.insert(current).second || !is_projected(current) || is_aten(node, {"linear"})) {
      continue;
    }
    const std::vector<Value*> parts = joined_tokens(node, shapes);
    if (std::any_of(parts.begin(), parts.end(), is_kept)) {
      return {CacheKind::kGrowing, is_projected(parts.back())};
    }
    if (writes_tokens(node) && !is_projected(node->input(0))) {
      return {CacheKind::kStatic};
    }
    queue.insert(queue.end(), node->inputs().begin(), node->inputs().end());
    for (torch::jit::Block* block :
         node->kind() == c10::prim::If ? node->blocks() : at::ArrayRef<torch::jit::Block*>()) {
      queue.push_back(block->outputs()[current->offset()]);
    }
  }
  return {};
}

bool reads_tokens(Value* tokens, Value* source, SymbolicShapes& shapes) {
  if (strip_layout(tokens) == strip_layout(source)) {
    return true;
  }
  // Norms act on each token: perhaps queries and keys have one each.
  tokens = streams_of(tokens).back();
  source = streams_of(source).back();
  if (tokens == source) {
    return true;
  }
  const std::vector<Value*> parts = joined_tokens(tokens->node(), shapes);
  return std::any_of(parts.begin(), parts.end(), [&](Value* part) { return strip_passive(part) == source; });
}

}  // namespace torchgraft
