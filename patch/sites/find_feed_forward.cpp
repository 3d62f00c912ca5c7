#include <torchgraft/patch/sites/find_feed_forward.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/sites/find_residual.h>

#include <algorithm>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

namespace {

struct FeedForward {
  std::vector<Node*> in;
  LinearSite out;
  ResidualSite residual;
};

// Linear maps that read one of `streams` through at most one norm, as the entry of a feed-forward block does. T5 in
// float16 keeps its stream in range by a clamp, which the block and its residual both read.
std::vector<Node*> linears_reading(SiteFinder& finder, const std::vector<Value*>& streams) {
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
      if (use.offset != 0 || !finder.is_at_home(user)) {
        continue;
      }
      if (is_linear(user)) {
        if (!finder.attention_projections().count(user) &&
            std::find(result.begin(), result.end(), user) == result.end()) {
          result.push_back(user);
        }
      } else if ((is_layout(user) || is_aten(user, {"dropout", "clamp"}) || (is_norm(user) && !normed)) &&
                 seen.insert(user->output()).second) {
        frontier.emplace_back(user->output(), normed || is_norm(user));
      }
    }
  }
  return result;
}

// Whether `linear` is the gate in act(gate(x)) * in(x), the product of two linear maps: the one with the activation.
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
        if (!is_linear(user) && seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  return false;
}

// Blocks of one or two linear maps at the entry and one at the end that read one of `streams` and are added to it.
std::vector<FeedForward> feed_forwards(SiteFinder& finder, const std::vector<Value*>& streams,
                                       const LayerSites& sites) {
  std::vector<FeedForward> blocks;
  for (Node* in : linears_reading(finder, streams)) {
    const auto out = finder.linear_behind(in->output(), /*through_any_op=*/true);
    bool sequence_first = false;
    if (!out || finder.attention_projections().count(out->node) || out->node == sites.output->node ||
        !finder.layout_of(linear_input(in), sequence_first) ||
        !finder.layout_of(linear_input(out->node), sequence_first)) {
      continue;
    }
    const auto same =
        std::find_if(blocks.begin(), blocks.end(), [&](const FeedForward& b) { return b.out.node == out->node; });
    if (same != blocks.end()) {
      same->in.push_back(in);
      continue;
    }
    // A block is added to what it reads; another residual means that `out` ends another block.
    const auto residual = find_residual(finder, out->node->output(), linear_input(in));
    if (residual && norm_order(linear_input(in), residual->residual) != NormOrder::kNone) {
      blocks.push_back({{in}, *out, *residual});
    }
  }
  return blocks;
}

}  // namespace

void find_feed_forward(SiteFinder& finder, Layer& layer, LayerSites& sites) {
  if (!sites.attention_residual) {
    return;
  }
  const ResidualSite& attention = *sites.attention_residual;
  auto blocks = feed_forwards(finder, streams_of(linear_input(sites.query.node)), sites);
  if (blocks.empty()) {
    std::vector<Value*> behind = {attention.sum->output()};
    if (attention.norm) {
      behind.push_back(attention.norm->output());
    }
    blocks = feed_forwards(finder, behind, sites);
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
    layer.ffn_gate = finder.describe(block.in[gate]);
    finder.layout_of(linear_input(sites.ffn_gate->node), sites.ffn_gate->sequence_first);
    block.in.erase(block.in.begin() + static_cast<std::ptrdiff_t>(gate));
  }
  sites.ffn_in = LinearSite{block.in[0]};
  finder.layout_of(linear_input(block.in[0]), sites.ffn_in->sequence_first);
  sites.ffn_out = block.out;
  sites.ffn_residual = block.residual;
  layer.ffn_in = finder.describe(sites.ffn_in->node);
  layer.ffn_out = finder.describe(sites.ffn_out->node);
  layer.has_ffn_residual = true;
  layer.ffn_norm_order = norm_order(linear_input(sites.ffn_in->node), block.residual.residual);
  if (layer.ffn_norm_order == NormOrder::kPost) {
    sites.ffn_residual->norm = norm_after(block.residual.sum->output());
    layer.ffn_norm_order = sites.ffn_residual->norm ? NormOrder::kPost : NormOrder::kNone;
  }
}

}  // namespace torchgraft
