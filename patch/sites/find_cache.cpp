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

// What `node` writes into a cache; null where it writes numbers, or something else.
Value* written_tokens(Node* node) {
  for (const char* name : {"source", "values", "src"}) {
    if (writes_tokens(node) && node->schema().argumentIndexWithName(name)) {
      Value* written = node->namedInput(name);
      return is_aten(written->node(), {"expand_as"}) ? written->node()->namedInput("self") : written;
    }
  }
  return nullptr;
}

// A cache of earlier passes, times what is 0 where this pass writes.
bool is_masked_cache(Value* value) {
  const auto factors = value->node()->inputs();
  return is_tensor(value) && is_aten(value->node(), {"mul"}) && !is_projected(value) &&
         std::any_of(factors.begin(), factors.end(), is_of_earlier_passes);
}

// Whether `node` puts tokens of this pass among earlier ones: where(is_new, new, kept), or kept * (1 - is_new) + new.
bool mixes_in_tokens(const Node* node) {
  const auto inputs = const_cast<Node*>(node)->inputs();
  if (is_aten(node, {"where"}) && inputs.size() == 3) {
    return is_of_earlier_passes(inputs[1]) || is_of_earlier_passes(inputs[2]);
  }
  return is_aten(node, {"add"}) && (is_masked_cache(inputs[0]) || is_masked_cache(inputs[1]));
}

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

// Whether two linear maps that read `a` and `b` read one stream. Norms act on each token: perhaps each map has its own.
bool is_one_stream(Value* a, Value* b) {
  return strip_layout(a) == strip_layout(b) || streams_of(a).back() == streams_of(b).back();
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
    if ((writes_tokens(node) && !is_projected(node->input(0))) || mixes_in_tokens(node)) {
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

std::optional<CacheKind> cache_of_inputs(Value* tokens, Value* source, SymbolicShapes& shapes) {
  if (is_one_stream(tokens, source)) {
    return CacheKind::kNone;
  }
  for (Value* stream : streams_of(tokens)) {
    Node* node = stream->node();
    if (node->kind() == c10::prim::If) {  // `if past is not None:`
      const auto left = cache_of_inputs(node->blocks()[0]->outputs()[stream->offset()], source, shapes);
      const auto right = cache_of_inputs(node->blocks()[1]->outputs()[stream->offset()], source, shapes);
      return left && right ? std::optional(*left == CacheKind::kNone ? *right : *left) : std::nullopt;
    }
    const std::vector<Value*> parts = joined_tokens(node, shapes);
    if (std::any_of(parts.begin(), parts.end(), [&](Value* part) { return is_one_stream(part, source); })) {
      return CacheKind::kGrowing;
    }
    Value* written = written_tokens(node);
    if (written && !is_projected(node->input(0)) && is_one_stream(written, source)) {
      return CacheKind::kStatic;
    }
  }
  return std::nullopt;
}

}  // namespace torchgraft
