#include <torchgraft/patch/insert/heads_of_masks.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

// The heads of which `node` makes a dimension of a mask [B * heads, S, S], rows first: as nn.MultiheadAttention does,
// or raise_attention, where the mask meets scores of that shape. None: it does no such thing, or not by a number.
std::optional<int64_t> heads_split_off(Node* node) {
  if (is_aten(node, {"unflatten"}) && constant_int(node->input(1)) == 0) {
    const auto sizes = torch::jit::constant_as<c10::List<int64_t>>(node->input(2));
    return sizes && sizes->size() == 2 && sizes->get(0) == -1 ? std::optional(sizes->get(1)) : std::nullopt;
  }
  const bool is_view = is_aten(node, {"view", "reshape"}) &&
                       node->input(1)->node()->kind() == c10::prim::ListConstruct &&
                       node->input(1)->node()->inputs().size() == 4 &&
                       !torch::jit::toIValue(node->input(1)->node()->input(0));  // 1: of all rows together
  return is_view ? torch::jit::constant_as<int64_t>(node->input(1)->node()->input(1)) : std::nullopt;
}

// Pointwise, of values of which none has more dimensions than the result: what has as many sizes along one has them
// in the same place.
bool keeps_places(const Node* node) {
  return is_elementwise(node) ||
         is_aten(node, {"masked_fill", "where", "to",  "contiguous", "zeros_like", "expand", "atleast_2d",
                        "gt",          "ge",    "lt",  "le",         "eq",         "ne",     "logical_not",
                        "bitwise_not", "add",   "sub", "rsub",       "mul",        "div"});
}

}  // namespace

void add_heads_of_masks(const Node* attention, std::map<const Value*, int64_t>& found) {
  Node* view = attention->input(3)->node();
  while (is_aten(view, {"atleast_2d", "type_as", "to"})) {
    view = view->input(0)->node();
  }
  const auto heads = heads_split_off(view);
  if (!heads || *heads < 2) {
    return;
  }
  std::vector<Value*> frontier = {view->input(0)};
  std::set<Value*> seen(frontier.begin(), frontier.end());
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (node->kind() == c10::prim::Param) {
      found.emplace(frontier[i], *heads);
    }
    if (keeps_places(node)) {
      std::copy_if(node->inputs().begin(), node->inputs().end(), std::back_inserter(frontier),
                   [&](Value* input) { return seen.insert(input).second; });
    }
  }
}

}  // namespace torchgraft
