#include <torchgraft/patch/sites/apply_sites.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/sites/find_layer_end.h>
#include <torchgraft/patch/sites/find_residual.h>
#include <torchgraft/patch/sites/site_finder.h>

#include <map>
#include <set>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

namespace {

std::string entry_name(const Layer& layer) { return "sites: the entry with index " + std::to_string(layer.index); }

void check_same_sizes(const Layer& wanted, const Layer& found) {
  const auto check = [&](const char* field, int64_t given, int64_t actual) {
    TORCH_CHECK(given == actual, entry_name(wanted), ": \"", field, "\" is ", given, ", but the model's is ", actual,
                "; sizes cannot be edited");
  };
  check("num_heads", wanted.num_heads, found.num_heads);
  check("num_kv_heads", wanted.num_kv_heads, found.num_kv_heads);
  check("head_dim", wanted.head_dim, found.head_dim);
  check("hidden_size", wanted.hidden_size, found.hidden_size);
}

bool is_same(const std::optional<Projection>& a, const std::optional<Projection>& b) {
  return a && b && a->path == b->path && a->offset == b->offset && a->out_features == b->out_features;
}

LinearSite site_at(SiteFinder& finder, const Projection& wanted, const std::string& what) {
  LinearSite site{finder.linear_at(wanted.path, what)};
  const Projection whole = finder.describe(site.node);
  TORCH_CHECK(whole.in_features == wanted.in_features && wanted.offset >= whole.offset &&
                  wanted.offset + wanted.out_features <= whole.offset + whole.out_features,
              what, ": '", wanted.path, "' has ", whole.in_features, " inputs and ", whole.out_features,
              " columns; the entry says ", wanted.in_features, " inputs and columns ", wanted.offset, " to ",
              wanted.offset + wanted.out_features);
  TORCH_CHECK(finder.layout_of(linear_input(site.node), site.sequence_first), what, ": the input of '", wanted.path,
              "' is not of shape [batch, tokens, features] (or tokens first)");
  site.offset = wanted.offset - whole.offset;
  site.width = wanted.out_features;
  site.is_part = wanted.out_features != whole.out_features;
  return site;
}

void apply_residual(SiteFinder& finder, const Layer& wanted, const char* field, bool has_one, NormOrder order,
                    const LinearSite* behind, const LinearSite& in, std::optional<ResidualSite>& site) {
  const std::string what = entry_name(wanted) + ": \"" + field + "\"";
  if (!has_one) {
    site.reset();
    return;
  }
  if (!site && behind) {
    site = find_residual(finder, behind->node->output(), linear_input(in.node));
  }
  TORCH_CHECK(site, what, " is true, but the model has no residual add there; set it to false");
  Node* norm = norm_after(site->sum->output());
  TORCH_CHECK(order != NormOrder::kPost || norm, what,
              ": the norm order is \"post\", but no norm follows the sum as its only reader; use \"pre\" or \"none\"");
  site->norm = order == NormOrder::kPost ? norm : nullptr;
}

// Overrules what was found for `layer` by an edited entry.
void apply(SiteFinder& finder, const Layer& wanted, Layer& layer, LayerSites& sites) {
  check_same_sizes(wanted, layer);
  if (const auto query = finder.shapes().shape(sites.attention->namedInput("query"))) {
    finder.batch() = query->front();
  }
  // Returns whether the projection is another now.
  const auto overrule = [&](const char* role, const std::optional<Projection>& given, std::optional<Projection>& known,
                            std::optional<LinearSite>& site) {
    if (given && !is_same(given, known)) {
      site = site_at(finder, *given, entry_name(wanted) + ": \"" + role + "\"");
    } else if (!given) {
      site.reset();
    }
    const bool moved = !is_same(given, known);
    known = given;
    return moved;
  };
  const auto overrule_attention = [&](const char* role, const std::optional<Projection>& given,
                                      std::optional<Projection>& known, LinearSite& site) {
    std::optional<LinearSite> chosen = site;
    overrule(role, given, known, chosen);
    site = chosen.value_or(site);  // without the projection LoRA has no site, but prefixes still read its input
  };
  overrule_attention("query", wanted.query, layer.query, sites.query);
  overrule_attention("key", wanted.key, layer.key, sites.key);
  overrule_attention("value", wanted.value, layer.value, sites.value);
  if (overrule("output", wanted.output, layer.output, sites.output)) {
    sites.attention_residual.reset();
  }
  overrule("ffn_in", wanted.ffn_in, layer.ffn_in, sites.ffn_in);
  overrule("ffn_gate", wanted.ffn_gate, layer.ffn_gate, sites.ffn_gate);
  if (overrule("ffn_out", wanted.ffn_out, layer.ffn_out, sites.ffn_out)) {
    sites.ffn_residual.reset();
  }
  apply_residual(finder, wanted, "attention_residual", wanted.has_attention_residual, wanted.norm_order,
                 sites.output ? &*sites.output : nullptr, sites.query, sites.attention_residual);
  apply_residual(finder, wanted, "ffn_residual", wanted.has_ffn_residual, wanted.ffn_norm_order,
                 sites.ffn_out ? &*sites.ffn_out : nullptr, sites.ffn_in ? *sites.ffn_in : sites.query,
                 sites.ffn_residual);
  layer.kind = wanted.kind;
  layer.number = wanted.number;
  layer.shares = wanted.shares;
  layer.norm_order = wanted.norm_order;
  layer.ffn_norm_order = wanted.ffn_norm_order;
  layer.has_attention_residual = wanted.has_attention_residual;
  layer.has_ffn_residual = wanted.has_ffn_residual;
}

}  // namespace

GraphSites apply_sites(const GraphSites& detected, const Structure& wanted, const CanonicalGraph& canonical,
                       const torch::jit::Module& module) {
  SiteFinder finder(canonical, module);
  GraphSites result;
  result.result_is_sequence_first = detected.result_is_sequence_first;
  result.embeddings = detected.embeddings;
  result.structure.embedding_size = detected.structure.embedding_size;
  result.structure.embedding_note = detected.structure.embedding_note;
  result.structure.has_output_embeddings = detected.structure.has_output_embeddings;
  result.structure.several_outputs = detected.structure.several_outputs;
  result.structure.other_outputs = detected.structure.other_outputs;
  result.structure.near_misses = detected.structure.near_misses;
  std::set<int64_t> seen;
  for (const Layer& entry : wanted.layers) {
    TORCH_CHECK(entry.index < static_cast<int64_t>(detected.layers.size()), entry_name(entry), ": the model has ",
                detected.layers.size(), " attentions, counted from 0");
    TORCH_CHECK(seen.insert(entry.index).second, entry_name(entry), " comes twice; remove one");
    Layer layer = detected.structure.layers[entry.index];
    LayerSites sites = detected.layers[entry.index];
    apply(finder, entry, layer, sites);
    result.structure.layers.push_back(std::move(layer));
    result.layers.push_back(std::move(sites));
  }
  if (!result.layers.empty() && !detected.layers.empty()) {  // also where the first layer was removed
    result.structure.layers.front().linear_maps = detected.structure.layers.front().linear_maps;
    result.layers.front().linear_maps = detected.layers.front().linear_maps;
  }
  // Of the runs of a layer, the first one left stands for the layer.
  std::map<int64_t, int64_t> stands_for;
  for (Layer& layer : result.structure.layers) {
    if (layer.shares && !seen.count(*layer.shares)) {
      const auto [first, is_new] = stands_for.emplace(*layer.shares, layer.index);
      layer.shares = is_new ? std::nullopt : std::optional(first->second);
    }
  }
  find_layer_ends(result, *canonical.graph);
  return result;
}

GraphSites choose_sites(const CanonicalGraph& canonical, const torch::jit::Module& module,
                        const std::optional<Structure>& wanted) {
  const GraphSites detected = find_sites(canonical, module);
  return wanted ? apply_sites(detected, *wanted, canonical, module) : detected;
}

}  // namespace torchgraft
