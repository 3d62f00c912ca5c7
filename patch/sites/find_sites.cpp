#include <torchgraft/patch/sites/find_sites.h>

#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/sites/find_attention.h>
#include <torchgraft/patch/sites/find_embeddings.h>
#include <torchgraft/patch/sites/find_feed_forward.h>
#include <torchgraft/patch/sites/find_layer_end.h>
#include <torchgraft/patch/sites/find_lookups.h>
#include <torchgraft/patch/sites/find_residual.h>
#include <torchgraft/patch/sites/single_heads.h>
#include <torchgraft/patch/sites/site_finder.h>
#include <torchgraft/plan/locations.h>

#include <map>
#include <set>
#include <tuple>
#include <unordered_set>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

// The attentions that `value` is computed from.
std::unordered_set<const Node*> attentions_behind(Value* value) {
  std::unordered_set<const Node*> attentions;
  std::unordered_set<const Value*> seen = {value};
  std::vector<Value*> frontier = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (is_aten(node, {"scaled_dot_product_attention"})) {
      attentions.insert(node);
    }
    std::vector<Value*> sources(node->inputs().begin(), node->inputs().end());
    if (node->kind() == c10::prim::If) {
      for (Block* block : node->blocks()) {
        sources.push_back(block->outputs()[frontier[i]->offset()]);
      }
    }
    for (Value* source : sources) {
      if (seen.insert(source).second) {
        frontier.push_back(source);
      }
    }
  }
  return attentions;
}

// Self attentions whose result a cross attention reads belong to an encoder.
void mark_encoder(GraphSites& sites) {
  std::unordered_set<const Value*> memories;
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    Node* key = sites.layers[i].key.node;
    Value* memory = key ? linear_input(key) : nullptr;
    if (!memory || sites.structure.layers[i].kind != AttentionKind::kCross || !memories.insert(memory).second) {
      continue;
    }
    const auto behind = attentions_behind(memory);
    for (size_t j = 0; j < sites.layers.size(); ++j) {
      if (sites.structure.layers[j].kind == AttentionKind::kSelf && behind.count(sites.layers[j].attention)) {
        sites.structure.layers[j].kind = AttentionKind::kEncoder;
      }
    }
  }
}

// The rows of a layer's weights, equal for two runs of one layer: data, first row, and the columns of the output.
using LayerWeights = std::vector<std::tuple<const void*, int64_t, int64_t, int64_t>>;

// Empty when a weight is computed at run time.
LayerWeights weights_of(const LayerSites& sites, const Module& module) {
  LayerWeights result;
  for (const LinearSite* site : {&sites.query, &sites.key, &sites.value, sites.output ? &*sites.output : nullptr,
                                 sites.ffn_in ? &*sites.ffn_in : nullptr, sites.ffn_out ? &*sites.ffn_out : nullptr}) {
    if (!site || !site->node) {
      result.emplace_back(nullptr, 0, 0, 0);
      continue;
    }
    const WeightSource source = weight_source(linear_weight(site->node), module);
    if (source.is_computed()) {
      return {};
    }
    result.emplace_back(source.identity(), source.first_row.value_or(-1), site->offset, site->width);
  }
  return result;
}

// Numbers Transformer layers from 0 in the order in which they first run. A layer that runs again keeps its number. A
// cross attention has the number of the self attention right before it, unless a feed-forward block lies between them.
void number_layers(GraphSites& sites, const Module& module) {
  std::map<LayerWeights, int64_t> first_runs;
  int64_t next = 0;
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    Layer& layer = sites.structure.layers[i];
    layer.index = static_cast<int64_t>(i);
    const auto weights = weights_of(sites.layers[i], module);
    const auto [first, is_new] = weights.empty() ? std::pair(first_runs.end(), true) : first_runs.emplace(weights, i);
    if (!is_new) {
      layer.shares = first->second;
      layer.number = sites.structure.layers[first->second].number;
      continue;
    }
    Layer* before = i > 0 ? &sites.structure.layers[i - 1] : nullptr;
    const bool continues = layer.kind == AttentionKind::kCross && before && before->kind == AttentionKind::kSelf &&
                           !before->has_ffn_residual && !before->shares;
    layer.number = continues ? before->number : next++;
    if (continues) {  // the layer's feed-forward block is behind its cross attention
      std::erase(before->notes, kNoFeedForward);
    }
  }
}

// A layer whose queries are made of no other layer's result begins a stack.
void number_stacks(GraphSites& sites) {
  int64_t stacks = 0;
  for (size_t i = 0; i < sites.layers.size(); ++i) {
    const auto behind = attentions_behind(sites.layers[i].attention->namedInput("query"));
    size_t before = i;
    while (before > 0 && !behind.count(sites.layers[before - 1].attention)) {
      --before;
    }
    sites.structure.layers[i].stack = before > 0 ? sites.structure.layers[before - 1].stack : stacks++;
  }
}

bool find_layer(SiteFinder& finder, Node* attention, Layer& layer, LayerSites& sites, std::string& reason) {
  if (!find_attention(finder, attention, layer, sites, reason)) {
    return false;
  }
  find_attention_residual(finder, layer, sites);
  find_feed_forward(finder, layer, sites);
  if (finder.is_top_level(attention)) {
    return true;
  }
  if (!layer.has_attention_residual || !layer.has_ffn_residual) {
    reason = "it is inside a branch, and no whole layer is: " + c10::Join("; ", layer.notes);
    return false;
  }
  layer.notes.emplace_back("it is inside a branch: adapters act in it, and have gates, where the branch runs");
  return true;
}

std::string at_path(const std::string& path) { return path.empty() ? "" : "at " + path + ": "; }

// Calls visit(site) for each linear map with a role in a layer, const or not.
template <typename Sites, typename Visitor>
void for_each_site(Sites& layer, Visitor&& visit) {
  for (auto* site : {&layer.query, &layer.key, &layer.value}) {
    visit(*site);
  }
  for (auto* site : {&layer.output, &layer.ffn_in, &layer.ffn_gate, &layer.ffn_out}) {
    if (*site) {
      visit(**site);
    }
  }
}

// The linear maps that have a role in some layer, or share a weight with one that has.
std::set<const Node*> nodes_with_a_role(const GraphSites& found) {
  std::set<const Node*> result;
  const auto add = [&](const LinearSite& site) {
    result.insert(site.node);
    result.insert(site.elsewhere.begin(), site.elsewhere.end());
  };
  for (const LayerSites& layer : found.layers) {
    for_each_site(layer, add);
  }
  return result;
}

// Linear maps with no role in any layer, on which a LoRA can be: each has a weight of its own that runs once, on tokens
// or on one vector for each row. They go to the first layer.
void find_linear_maps(SiteFinder& finder, torch::jit::Graph& graph, GraphSites& found) {
  if (found.layers.empty()) {
    return;
  }
  const std::set<const Node*> taken = nodes_with_a_role(found);
  std::map<std::string, size_t> runs;
  for_each_node(graph.block(), [&](Node* node) { runs[is_linear(node) ? finder.path_of(node) : ""]++; });
  for (Node* node : graph.nodes()) {
    if (!is_linear(node) || taken.count(node)) {
      continue;
    }
    const Projection projection = finder.describe(node);
    LinearSite site{node};
    const auto shape = finder.shapes().shape(linear_input(node));
    site.is_row = shape && shape->size() == 2 && (*shape)[0] == finder.shapes().canonical(finder.batch());
    const bool has_layout = site.is_row || finder.layout_of(linear_input(node), site.sequence_first);
    if (has_layout && !projection.path.empty() && !projection.packed && projection.out_features > 0 &&
        runs.at(projection.path) == 1) {
      found.structure.layers.front().linear_maps.push_back(projection);
      found.layers.front().linear_maps.push_back(site);
    }
  }
}

// Names the ops on quantised numbers that no pass reads: layers around them are not seen, or seen in part.
void name_unread_quantized(torch::jit::Graph& graph, GraphSites& found) {
  std::map<std::string, std::pair<size_t, const Node*>> kinds;  // how often each kind occurs, and where first
  for_each_node(graph.block(), [&](Node* node) {
    const std::string kind = node->kind().toQualString();
    const bool is_aside = kind.find("conv") != std::string::npos || kind.find("pool") != std::string::npos;
    if (is_unread_quantized(node) && !is_aside) {
      ++kinds.try_emplace(kind, 0, node).first->second.first;
    }
  });
  if (kinds.empty()) {
    return;
  }
  std::vector<std::string> names;
  for (const auto& [kind, where] : kinds) {
    names.push_back(described(where.second) + (where.first > 1 ? c10::str(" (", where.first, " times)") : ""));
  }
  const std::string text =
      "int8 layers were left out, which compute on quantised numbers: " + c10::Join(", ", names) +
      "; of quantised layers only those of torch.ao.quantization.quantize_dynamic are read: quantise in that way, or "
      "graft the module in float32";
  found.structure.near_misses.push_back(text);
  found.left_out.push_back(text);
}

}  // namespace

void mark_used_elsewhere(torch::jit::Graph& graph, const Module& module, GraphSites& found) {
  const std::set<const Node*> taken = nodes_with_a_role(found);
  const auto weight_of = [&](const Node* linear) {
    const WeightSource source = weight_source(linear_weight(linear), module);
    return source.is_computed() ? nullptr : source.identity();
  };
  std::set<const void*> others;
  for_each_node(graph.block(), [&](Node* node) {
    if (is_linear(node) && !taken.count(node)) {
      others.insert(weight_of(node));
    }
  });
  others.erase(nullptr);
  for (LayerSites& layer : found.layers) {
    for_each_site(
        layer, [&](LinearSite& site) { site.is_used_elsewhere = site.node && others.count(weight_of(site.node)) > 0; });
  }
}

GraphSites find_sites(const CanonicalGraph& canonical, const Module& module) {
  GraphSites result;
  SiteFinder finder(canonical, module);
  for_each_node(canonical.graph->block(), [&](Node* node) {
    if (!is_aten(node, {"scaled_dot_product_attention"})) {
      return;
    }
    Layer layer;
    LayerSites sites;
    std::string reason;
    if (find_layer(finder, node, layer, sites, reason)) {
      result.structure.layers.push_back(std::move(layer));
      result.layers.push_back(std::move(sites));
    } else {
      const auto linears = nearest_linears(node->namedInput("query"));
      const std::string where = linears.empty() ? "" : finder.path_of(linears.front());
      result.structure.near_misses.push_back(at_path(where) + "attention was left out: " + reason);
      if (depends_on_inputs(node->namedInput("query"))) {
        result.left_out.push_back(result.structure.near_misses.back());
      }
    }
  });
  leave_out_single_heads(result, finder);
  mark_encoder(result);
  number_layers(result, module);
  number_stacks(result);
  find_layer_ends(result, *canonical.graph);
  for (const UnraisedSoftmax& miss : canonical.unraised) {
    const auto linears = nearest_linears(miss.softmax->namedInput("self"));
    const std::string where = linears.empty() ? "" : finder.path_of(linears.front());
    const char* what = is_softmax(miss.softmax) ? "a softmax was not taken for attention: "
                                                : "products of queries, keys and values were not taken for attention: ";
    result.structure.near_misses.push_back(at_path(where) + what + miss.reason);
    if (miss.is_attention) {
      result.left_out.push_back(result.structure.near_misses.back());
    }
  }
  for_each_node(canonical.graph->block(), [&](Node* node) {
    if (node->kind() == c10::prim::fork) {
      result.structure.near_misses.push_back(
          "what torch.jit.fork runs was left out, because its result is kept, in a list for instance; wait for it in "
          "the method that forks, or call the layer directly");
      result.left_out.push_back(result.structure.near_misses.back());
    }
  });
  name_unread_quantized(*canonical.graph, result);
  mark_used_elsewhere(*canonical.graph, module, result);
  find_linear_maps(finder, *canonical.graph, result);
  find_lookups(finder, canonical.graph, module, result);
  find_embeddings(finder, canonical.graph, result);
  result.result_is_sequence_first = finder.result_is_sequence_first();
  return result;
}

Value* LinearSite::input() const { return is_lookup ? node->namedInput("indices") : linear_input(node); }

const LinearSite* lora_site(const LayerSites& layer, const std::string& site) {
  const auto pointer = [](const std::optional<LinearSite>& linear) { return linear ? &*linear : nullptr; };
  const std::map<std::string, const LinearSite*> sites = {
      {"selfattn_lora_q", &layer.query},          {"selfattn_lora_k", &layer.key},
      {"selfattn_lora_v", &layer.value},          {"crossattn_lora_q", &layer.query},
      {"crossattn_lora_k", &layer.key},           {"crossattn_lora_v", &layer.value},
      {"selfattn_lora_o", pointer(layer.output)}, {"crossattn_lora_o", pointer(layer.output)},
      {"gate_lora", pointer(layer.ffn_gate)},     {"intermediate_lora", pointer(layer.ffn_in)},
      {"output_lora", pointer(layer.ffn_out)}};
  if (const auto position = linear_map_position(site)) {
    return &layer.linear_maps.at(*position);
  }
  const auto found = sites.find(site);
  return found == sites.end() ? nullptr : found->second;
}

}  // namespace torchgraft
