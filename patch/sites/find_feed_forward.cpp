#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/sites/site_finder.h>

#include <algorithm>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

// The one linear map that `value` flows into: through rearrangements and norms only, or through any element-wise op.
std::optional<LinearSite> SiteFinder::linear_behind(Value* value, bool through_any_op) {
  Node* found = nullptr;
  std::vector<Value*> frontier = {value};
  std::unordered_set<Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const auto& use : data_uses(frontier[i])) {
      Node* user = use.user;
      if (is_aten(user, {"linear"}) && use.offset == 0) {
        if (found && found != user) {
          return std::nullopt;
        }
        found = user;
        continue;
      }
      const bool unpacks = user->kind() == c10::prim::ListUnpack;
      const bool passes = is_layout(user) || is_aten(user, {"dropout"}) || is_norm(user) ||
                          (through_any_op &&
                           (unpacks || (user->kind().is_aten() &&
                                        !is_aten(user, {"scaled_dot_product_attention", "matmul", "bmm", "softmax"}))));
      if (!passes) {
        return std::nullopt;
      }
      for (Value* output : user->outputs()) {
        if (seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  if (!found || !is_top_level(found)) {
    return std::nullopt;
  }
  LinearSite site{found};
  layout_of(found->input(0), site.sequence_first);
  return site;
}

// Linear maps that read one of `streams` through at most one norm: ways into a feed-forward block.
std::vector<Node*> SiteFinder::linears_reading(const std::vector<Value*>& streams) {
  std::vector<Node*> result;
  std::vector<std::pair<Value*, bool>> frontier;  // value, whether a norm has been passed
  std::unordered_set<Value*> seen;
  for (Value* stream : streams) {
    if (seen.insert(stream).second) {
      frontier.emplace_back(stream, false);
    }
  }
  for (size_t i = 0; i < frontier.size(); ++i) {
    const auto [value, normed] = frontier[i];
    for (const auto& use : data_uses(value)) {
      Node* user = use.user;
      if (use.offset != 0 || !is_top_level(user)) {
        continue;
      }
      if (is_aten(user, {"linear"})) {
        if (!attention_projections_.count(user) && std::find(result.begin(), result.end(), user) == result.end()) {
          result.push_back(user);
        }
      } else if ((is_layout(user) || is_aten(user, {"dropout"}) || (is_norm(user) && !normed)) &&
                 seen.insert(user->output()).second) {
        frontier.emplace_back(user->output(), normed || is_norm(user));
      }
    }
  }
  return result;
}

namespace {

// Of two linear maps whose results are multiplied, act(gate(x)) * in(x): whether `linear` is the one with the
// activation.
bool is_gate(Node* linear, Node* other) {
  std::vector<Value*> frontier = {linear->output()};
  std::unordered_set<Value*> seen = {linear->output()};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const auto& use : data_uses(frontier[i])) {
      Node* user = use.user;
      if (is_aten(user, {"mul"}) && use.offset < 2) {
        const auto linears = nearest_linears(user->input(1 - use.offset));
        if (std::find(linears.begin(), linears.end(), other) != linears.end()) {
          return strip_passive(frontier[i]) != linear->output();
        }
      }
      for (Value* output : user->outputs()) {
        if (!is_aten(user, {"linear"}) && seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  return false;
}

}  // namespace

// Blocks of linear maps, one or two at the entry, that end in a residual add to what they read from one of `streams`.
std::vector<SiteFinder::FeedForward> SiteFinder::feed_forwards(const std::vector<Value*>& streams,
                                                               const LayerSites& sites) {
  std::vector<FeedForward> blocks;
  for (Node* in : linears_reading(streams)) {
    const auto out = linear_behind(in->output(), /*through_any_op=*/true);
    bool sequence_first = false;
    if (!out || attention_projections_.count(out->node) || out->node == sites.output->node ||
        !layout_of(in->input(0), sequence_first) || !layout_of(out->node->input(0), sequence_first)) {
      continue;
    }
    const auto same =
        std::find_if(blocks.begin(), blocks.end(), [&](const FeedForward& b) { return b.out.node == out->node; });
    if (same != blocks.end()) {
      same->in.push_back(in);
      continue;
    }
    // Its residual must be what it reads: the end of another block is none of ours.
    const auto residual = find_residual(out->node->output(), in->input(0));
    if (residual && norm_order(in->input(0), residual->residual) != NormOrder::kNone) {
      blocks.push_back({{in}, *out, *residual});
    }
  }
  return blocks;
}

// Beside the attention (parallel blocks read one norm), else behind its sum: linear, activation, linear, residual add;
// with two linear maps at its entry when it is gated.
void SiteFinder::find_feed_forward(Layer& layer, LayerSites& sites) {
  if (!sites.attention_residual) {
    return;
  }
  const ResidualSite& attention = *sites.attention_residual;
  auto blocks = feed_forwards(streams_of(sites.query.node->input(0)), sites);
  if (blocks.empty()) {
    std::vector<Value*> behind = {attention.sum->output()};
    if (attention.norm) {
      behind.push_back(attention.norm->output());
    }
    blocks = feed_forwards(behind, sites);
  }
  if (blocks.size() != 1 || blocks[0].in.size() > 2) {
    layer.notes.push_back(blocks.empty() ? kNoFeedForward
                                         : "several feed-forward blocks follow its attention; name one with --sites");
    return;
  }
  FeedForward& block = blocks.front();
  if (block.in.size() == 2) {
    const size_t gate = is_gate(block.in[0], block.in[1]) ? 0 : 1;
    sites.ffn_gate = LinearSite{block.in[gate]};
    layer.ffn_gate = describe(block.in[gate]);
    layout_of(sites.ffn_gate->node->input(0), sites.ffn_gate->sequence_first);
    block.in.erase(block.in.begin() + static_cast<std::ptrdiff_t>(gate));
  }
  sites.ffn_in = LinearSite{block.in[0]};
  layout_of(block.in[0]->input(0), sites.ffn_in->sequence_first);
  sites.ffn_out = block.out;
  sites.ffn_residual = block.residual;
  layer.ffn_in = describe(sites.ffn_in->node);
  layer.ffn_out = describe(sites.ffn_out->node);
  layer.has_ffn_residual = true;
  layer.ffn_norm_order = norm_order(sites.ffn_in->node->input(0), block.residual.residual);
  if (layer.ffn_norm_order == NormOrder::kPost) {
    sites.ffn_residual->norm = norm_after(block.residual.sum->output());
    layer.ffn_norm_order = sites.ffn_residual->norm ? NormOrder::kPost : NormOrder::kNone;
  }
}

}  // namespace torchgraft
