#include <torchgraft/patch/sites/single_heads.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <unordered_set>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

bool is_slice(const Node* node) {
  return node->kind() == c10::prim::ListUnpack || node->kind() == c10::aten::__getitem__ ||
         is_aten(node, {"slice", "select", "narrow", "chunk", "split", "split_with_sizes", "unbind", "index_select"});
}

// `value` before everything that rearranges it or takes parts of it.
const Value* before_slices(Value* value) {
  while (is_layout(value->node()) || is_slice(value->node())) {
    value = value->node()->input(0);
  }
  return value;
}

// The nodes in which the result of `attention` meets other values, before any linear map.
std::set<const Node*> meeting_points(Node* attention) {
  std::set<const Node*> result;
  std::unordered_set<const Value*> seen = {attention->output()};
  std::vector<Value*> frontier = {attention->output()};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const torch::jit::Use& use : data_uses(frontier[i])) {
      Node* user = use.user;
      if (is_in_place(user)) {  // into a part of what holds all heads
        result.insert(before_slices(user->input(0))->node());
      }
      const bool meets = is_aten(user, {"cat", "concat", "concatenate", "stack", "hstack", "add", "slice_scatter",
                                        "select_scatter", "index_put"});
      const bool carries = is_layout(user) || is_slice(user) || user->kind() == c10::prim::ListConstruct ||
                           is_aten(user, {"dropout", "mul", "div", "expand", "expand_as"});
      if (!meets && !carries) {
        continue;
      }
      if (meets) {
        result.insert(user);
      }
      for (Value* output : user->outputs()) {
        if (seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  return result;
}

bool intersect(const std::set<const Node*>& a, const std::set<const Node*>& b) {
  return std::any_of(a.begin(), a.end(), [&](const Node* node) { return b.count(node) > 0; });
}

// The attentions of each group by position, those that stand alone included.
std::vector<std::vector<size_t>> groups_of(const GraphSites& sites) {
  using Inputs = std::tuple<const Value*, const Value*, const Value*>;
  const auto input = [](const LinearSite& site) {
    return site.node ? before_slices(linear_input(site.node)) : nullptr;
  };
  std::map<Inputs, std::vector<std::pair<std::set<const Node*>, size_t>>> groups;  // the meeting points, the group
  std::vector<std::vector<size_t>> result;
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    const LayerSites& layer = sites.layers[i];
    auto& alike = groups[{input(layer.query), input(layer.key), input(layer.value)}];
    const std::set<const Node*> points = meeting_points(layer.attention);
    const auto found =
        std::find_if(alike.begin(), alike.end(), [&](const auto& group) { return intersect(group.first, points); });
    if (found == alike.end()) {
      alike.emplace_back(points, result.size());
      result.push_back({i});
    } else {
      found->first.insert(points.begin(), points.end());
      result[found->second].push_back(i);
    }
  }
  return result;
}

}  // namespace

void leave_out_single_heads(GraphSites& sites, SiteFinder& finder) {
  std::set<size_t> heads;
  for (const std::vector<size_t>& group : groups_of(sites)) {
    if (group.size() < 2) {
      continue;
    }
    heads.insert(group.begin(), group.end());
    const std::string path = finder.path_of(sites.layers[group.front()].query.node);
    const std::string text = c10::str(
        path.empty() ? "" : "at " + path + ": ", group.size(),
        " attentions were left out: they read the same input, and ",
        "their results are joined before any linear map, so they are heads of one attention; compute all heads at "
        "once, as [batch, heads, tokens, head size]");
    sites.left_out.push_back(text);
    sites.structure.near_misses.push_back(text);
  }
  GraphSites kept;
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    if (!heads.count(i)) {
      kept.layers.push_back(std::move(sites.layers[i]));
      kept.structure.layers.push_back(std::move(sites.structure.layers[i]));
    }
  }
  sites.layers = std::move(kept.layers);
  sites.structure.layers = std::move(kept.structure.layers);
}

}  // namespace torchgraft
