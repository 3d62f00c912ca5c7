#include <torchgraft/patch/sites/apply_sites.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/sites/find_feed_forward.h>
#include <torchgraft/patch/sites/find_layer_end.h>
#include <torchgraft/patch/sites/find_residual.h>
#include <torchgraft/patch/sites/site_finder.h>

#include <map>
#include <set>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

namespace {

std::string entry_name(const Layer& layer) {
  return layer.has_core ? "sites: the entry with index " + std::to_string(layer.index)
                        : "sites: the entry without an index of layer " + std::to_string(layer.number);
}

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
  site.packed_width = whole.out_features;
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
  if (sites.attention) {
    if (const auto query = finder.shapes().shape(sites.attention->namedInput("query"))) {
      finder.batch() = query->front();
    }
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

// The shape of what a linear map reads; that follows from what its result is used for, too.
std::optional<Shape> input_shape(SiteFinder& finder, Node* linear) {
  finder.shapes().shape(linear->output());
  return finder.shapes().shape(linear_input(linear));
}

// Without an attention that tells which dimension is the batch, it is the first one. What the attention gives has as
// many rows and tokens as what it reads, though its shape may not be seen.
void assume_layout(SiteFinder& finder, const Layer& entry, const std::string& what) {
  const auto read = input_shape(finder, finder.linear_at(entry.query->path, what + ": \"query\""));
  TORCH_CHECK(read && read->size() == 3, what, ": the input of '", entry.query->path,
              "' is not of shape [batch, tokens, features]");
  if (entry.output) {
    const auto given = input_shape(finder, finder.linear_at(entry.output->path, what + ": \"output\""));
    for (size_t i = 0; given && given->size() == 3 && i < 2; ++i) {
      finder.shapes().assume_equal((*read)[i], (*given)[i]);
    }
  }
  if (finder.batch() == Dim{}) {
    finder.batch() = finder.shapes().canonical(read->front());
  }
}

// The layer around an attention that was not recognised, from the projections that an entry names.
void find_described(SiteFinder& finder, const Layer& entry, int64_t index, Layer& layer, LayerSites& sites) {
  const std::string what = entry_name(entry);
  TORCH_CHECK(entry.query, what, ": expected \"query\", the linear map that makes its queries");
  layer.has_core = false;
  layer.index = index;
  layer.number = entry.number;
  layer.kind = entry.kind;
  layer.notes.emplace_back(
      "its attention was not recognised: sites name its projections, on which LoRAs and bottlenecks act, no prefixes");
  assume_layout(finder, entry, what);
  const auto take = [&](const char* role, const std::optional<Projection>& given, std::optional<Projection>& known) {
    if (!given) {
      return std::optional<LinearSite>();
    }
    const std::string name = what + ": \"" + role + "\"";
    Projection projection = finder.describe(finder.linear_at(given->path, name));
    if (given->out_features > 0) {
      projection.packed = projection.packed || given->out_features != projection.out_features;
      projection.offset = given->offset;
      projection.out_features = given->out_features;
    }
    known = projection;
    return std::optional(site_at(finder, projection, name));
  };
  sites.query = *take("query", entry.query, layer.query);
  sites.key = take("key", entry.key, layer.key).value_or(LinearSite());
  sites.value = take("value", entry.value, layer.value).value_or(LinearSite());
  layer.hidden_size = layer.query->in_features;
  sites.output = take("output", entry.output, layer.output);
  if (sites.output) {
    find_output_residual(finder, layer, sites);
    find_feed_forward(finder, layer, sites);
  }
}

// So that none of them is taken for the entry of a feed-forward block.
void add_described_projections(SiteFinder& finder, const Structure& wanted) {
  for (const Layer& entry : wanted.layers) {
    for (const auto* projection : {&entry.query, &entry.key, &entry.value}) {
      if (!entry.has_core && *projection) {
        finder.add_attention_projection(finder.linear_at((*projection)->path, entry_name(entry)));
      }
    }
  }
}

// Sites are inserted in the order of the entries.
void check_in_order(const GraphSites& sites) {
  for (size_t i = 1; i < sites.layers.size(); ++i) {
    const bool is_detected = sites.structure.layers[i - 1].has_core && sites.structure.layers[i].has_core;
    TORCH_CHECK(is_detected || sites.layers[i - 1].query.node->isBefore(sites.layers[i].query.node), "sites: entry ", i,
                " of \"layers\" runs before entry ", i - 1, "; give the entries in the order in which they run");
  }
}

// The batch size in the attentions that were recognised; the default where there are none.
Dim detected_batch(SiteFinder& finder, const GraphSites& detected) {
  if (detected.layers.empty()) {
    return {};
  }
  const auto query = finder.shapes().shape(detected.layers.front().attention->namedInput("query"));
  return query ? finder.shapes().canonical(query->front()) : Dim{};
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
  add_described_projections(finder, wanted);
  std::set<int64_t> seen;
  auto index = static_cast<int64_t>(detected.layers.size());  // of the next entry that has none
  for (const Layer& entry : wanted.layers) {
    if (!entry.has_core) {
      Layer layer;
      LayerSites sites;
      finder.batch() = detected_batch(finder, detected);
      find_described(finder, entry, index++, layer, sites);
      if (!entry.is_brief) {
        apply(finder, entry, layer, sites);
      }
      result.structure.layers.push_back(std::move(layer));
      result.layers.push_back(std::move(sites));
      result.result_is_sequence_first = finder.result_is_sequence_first();
      continue;
    }
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
  check_in_order(result);
  mark_used_elsewhere(*canonical.graph, module, result);
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
