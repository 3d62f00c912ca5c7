#include <torchgraft/patch/insert/mask_uses.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <algorithm>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace torchgraft {

using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

namespace {

bool is_mask_of(const Node* attention, const Value* value) { return attention->namedInput("attn_mask") == value; }

// What an If gives where the use is what one of its blocks returns; else null.
Value* result_of_block(const Use& use) {
  Node* owner = use.user->kind() == c10::prim::Return ? use.user->owningBlock()->owningNode() : nullptr;
  return owner && owner->kind() == c10::prim::If ? owner->output(use.offset) : nullptr;
}

// What the use makes of a bias of scores, if it keeps zeros; else null.
Value* passed_on(const Use& use) {
  if (Value* result = result_of_block(use)) {
    return result;
  }
  const bool keeps =
      is_mask_cast(use.user) || is_mask_reshape(use.user) || is_aten(use.user, {"masked_fill", "atleast_2d", "clamp"});
  const bool adds = is_aten(use.user, {"add"}) && use.offset < 2;
  return adds || (keeps && use.offset == 0) ? use.user->output() : nullptr;
}

// Reads a tensor for its sizes, dtype and the like.
bool forgets_values(const Node* node) {
  return node->kind() == c10::prim::dtype || node->kind() == c10::prim::device ||
         is_aten(node, {"size", "dim", "zeros_like", "ones_like", "full_like"});
}

// Reads all but the first operand so.
bool takes_first(const Node* node) {
  return is_aten(node, {"type_as", "to", "expand_as", "view_as", "expand", "view", "reshape"});
}

bool ends_in_masks(const Value* value) {
  return std::all_of(value->uses().begin(), value->uses().end(), [&](const Use& use) {
    if (is_attention(use.user)) {
      return is_mask_of(use.user, value);
    }
    const Value* next = passed_on(use);
    return next && ends_in_masks(next);
  });
}

}  // namespace

bool is_attention(const Node* node) {
  return is_aten(node, {"scaled_dot_product_attention"}) ||
         std::string_view(node->kind().toQualString()) == "torchgraft::gated_prefix_attention";
}

bool is_mask_cast(const Node* node) { return is_aten(node, {"type_as", "to"}); }

bool is_mask_reshape(const Node* node) {
  return is_aten(node, {"view", "reshape", "expand_as", "expand", "unsqueeze"});
}

bool is_only_mask(Value* value) {
  return std::all_of(value->uses().begin(), value->uses().end(), [&](const Use& use) {
    if (is_attention(use.user)) {
      return is_mask_of(use.user, value);
    }
    if (Value* result = result_of_block(use)) {
      return is_only_mask(result);
    }
    return (is_mask_cast(use.user) || is_mask_reshape(use.user)) && use.offset == 0 && is_only_mask(use.user->output());
  });
}

bool sets_scores(Node* node, size_t index) {
  const bool sets = (is_aten(node, {"add"}) && index < 2) || (is_aten(node, {"masked_fill"}) && index == 1);
  return sets && !is_in_place(node) && ends_in_masks(node->output());
}

bool only_sets_scores(Value* value) {
  return std::all_of(value->uses().begin(), value->uses().end(), [](const Use& use) {
    return is_mask_reshape(use.user) && use.offset == 0 ? only_sets_scores(use.user->output())
                                                        : sets_scores(use.user, use.offset);
  });
}

bool is_of_weights(Value* value, const Module& root) {
  std::unordered_set<const Value*> seen = {value};
  std::vector<Value*> frontier = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    const at::Tensor tensor = resolve_tensor(frontier[i], root);
    const bool is_weight = tensor.defined() && tensor.is_floating_point() && tensor.numel() > 1;
    if (is_weight || is_linear(node) || is_attention(node) ||
        is_aten(node, {"embedding", "matmul", "bmm", "mm", "conv1d", "conv2d"})) {
      return true;
    }
    std::vector<Value*> inputs(node->inputs().begin(), node->inputs().end());
    inputs.resize(forgets_values(node) ? 0 : takes_first(node) ? 1 : inputs.size());
    for (torch::jit::Block* block : node->blocks()) {
      inputs.insert(inputs.end(), block->outputs().begin(), block->outputs().end());
    }
    for (Value* input : inputs) {
      if (seen.insert(input).second) {
        frontier.push_back(input);
      }
    }
  }
  return false;
}

}  // namespace torchgraft
