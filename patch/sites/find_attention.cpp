#include <torchgraft/patch/sites/find_attention.h>

#include <torchgraft/patch/canonicalise/cached_tokens.h>
#include <torchgraft/patch/canonicalise/may_be_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/sites/column_probe.h>
#include <torchgraft/patch/sites/find_cache.h>

#include <algorithm>
#include <unordered_set>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

namespace {

// Whether `columns` are runs of `length` columns in a row, each `step` behind the one before.
bool lie_in_steps(const std::vector<int64_t>& columns, int64_t length, int64_t step) {
  for (size_t i = 0; i < columns.size(); ++i) {
    const auto position = static_cast<int64_t>(i);
    if (columns[i] != columns.front() + position / length * step + position % length) {
      return false;
    }
  }
  return true;
}

// Finds the columns of its linear map's output that `heads` reads. Without them only LoRA is left out, with a note:
// prefixes do not need them.
bool find_columns(SiteFinder& finder, Value* heads, Projection& projection, LinearSite& site, Layer& layer,
                  std::string& reason) {
  const auto columns = columns_reaching(heads, site.node, finder.shapes());
  if (!columns || columns->empty()) {
    reason = c10::str("it cannot be seen which columns of ", projection.path, " it reads");
    return false;
  }
  site.width = static_cast<int64_t>(columns->size());
  if (site.width == projection.out_features) {
    return true;
  }
  site.offset = columns->front();
  site.is_part = true;
  site.packed_width = projection.out_features;
  if (!lie_in_steps(*columns, site.width,
                    0)) {  // [heads, pieces, head size]: the first head begins at piece * head size
    const int64_t pieces = projection.out_features / site.width;
    if (projection.out_features % site.width != 0 || site.offset % layer.head_dim != 0 ||
        site.offset >= pieces * layer.head_dim || !lie_in_steps(*columns, layer.head_dim, pieces * layer.head_dim)) {
      reason = c10::str("it reads columns of ", projection.path, " that lie neither in a row nor head by head");
      return false;
    }
    site.offset = site.offset / layer.head_dim * site.width;
    const std::string note = "the columns of " + projection.path +
                             " hold queries, keys and values head by head; LoRA on q, k, v changes its thirds in the "
                             "order of storage, as in AdapterHub";
    if (std::find(layer.notes.begin(), layer.notes.end(), note) == layer.notes.end()) {
      layer.notes.push_back(note);
    }
  }
  projection.packed = true;
  projection.offset += site.offset;
  projection.out_features = site.width;
  return true;
}

// Finds other linear maps that apply the weight of a projection. Returns false when a LoRA cannot change them too.
bool find_elsewhere(SiteFinder& finder, const Node* linear, LinearSite& site) {
  const WeightSource weight = weight_source(linear_weight(linear), finder.module());
  const auto found =
      weight.is_computed() ? finder.linears_elsewhere().end() : finder.linears_elsewhere().find(weight.identity());
  if (found == finder.linears_elsewhere().end()) {
    return true;
  }
  const bool shared_by_all_rows = std::all_of(found->second.begin(), found->second.end(), [&](Node* other) {
    const auto shape = finder.shapes().shape(linear_input(other));
    const bool whole = !weight.is_part && !weight_source(linear_weight(other), finder.module()).is_part;
    return whole && finder.is_top_level(other) && shape && shape->size() == 3 && shape->front() == number(1);
  });
  if (shared_by_all_rows) {
    site.elsewhere = found->second;
  }
  return shared_by_all_rows;
}

// "; quantized::linear at model.py:12 is between" when a quantised op that is not read leads to `value` with no linear
// map in between; else empty.
std::string quantized_behind(Value* value) {
  std::vector<Value*> frontier = {value};
  std::unordered_set<const Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (is_unread_quantized(node)) {
      return "; " + described(node) + " is between";
    }
    if (is_linear(node)) {
      continue;
    }
    for (Value* input : node->inputs()) {
      if (is_tensor(input) && seen.insert(input).second) {
        frontier.push_back(input);
      }
    }
  }
  return "";
}

// Finds the projection behind `heads`, the attention's input `role`. Fails without a linear map; only notes that its
// columns are unknown.
bool find_projection(SiteFinder& finder, Value* heads, const char* role, std::optional<Projection>& projection,
                     LinearSite& site, Layer& layer, std::string& reason) {
  const auto linears = nearest_linears(heads);
  if (linears.size() != 1) {
    reason = std::string(linears.empty() ? "no linear projection leads to its " : "several linear maps lead to its ") +
             role + quantized_behind(heads);
    return false;
  }
  site.node = linears.front();
  if (!finder.is_at_home(site.node)) {
    reason = std::string("the projection of its ") + role + " is inside another branch, or a loop";
    return false;
  }
  if (!finder.layout_of(linear_input(site.node), site.sequence_first)) {
    const std::string input = "the input of " + finder.path_of(site.node);
    reason = finder.is_square(linear_input(site.node))
                 ? input +
                       " has as many tokens as rows by its fixed sizes, which cannot be told apart; trace or export "
                       "the model with other sizes, or with open ones"
                 : input + " is not of shape [batch, tokens, features] (or tokens first)";
    return false;
  }
  if (is_unread_quantized(strip_layout(linear_input(site.node))->node()) ||
      is_unread_quantized(strip_layout(linear_weight(site.node))->node())) {
    reason = std::string("the projection of its ") + role + " reads quantised numbers";
    return false;
  }
  Projection found = finder.describe(site.node);
  std::string why_not;
  if (!find_elsewhere(finder, site.node, site)) {
    layer.notes.push_back(found.path + " is applied outside the attention too: LoRA changes it in the attention only");
  }
  if (found.out_features == 0) {
    layer.notes.push_back(std::string("the weight of its ") + role + " projection is computed, not a parameter");
  } else if (!find_columns(finder, heads, found, site, layer, why_not)) {
    layer.notes.push_back(std::string("no LoRA on its ") + role + ": " + why_not);
  } else {
    projection = found;
  }
  return true;
}

// Notes which of queries, keys and values are the same columns of one linear map: a LoRA on one changes the other.
void note_shared_maps(Layer& layer, const LayerSites& sites) {
  struct Role {
    const char* heads;
    const char* matrix;
    const std::optional<Projection>& projection;
    const LinearSite& site;
  };
  const Role roles[] = {{"queries", "q", layer.query, sites.query},
                        {"keys", "k", layer.key, sites.key},
                        {"values", "v", layer.value, sites.value}};
  for (const auto& [i, j] : {std::pair(0, 1), std::pair(0, 2), std::pair(1, 2)}) {
    const Role& a = roles[i];
    const Role& b = roles[j];
    const bool both = a.projection && b.projection && a.site.node == b.site.node;
    if (both && a.site.offset < b.site.offset + b.site.width && b.site.offset < a.site.offset + a.site.width) {
      layer.notes.push_back(c10::str("its ", a.heads, " and ", b.heads, " are one linear map, ", a.projection->path,
                                     ": a LoRA on ", a.matrix, " or ", b.matrix, " changes both, and two add up"));
    }
  }
}

// Finds what keys and values of earlier passes are kept in.
bool find_caches(SiteFinder& finder, Node* attention, Layer& layer, LayerSites& sites, std::string& reason) {
  const CacheSite keys = find_cache(attention->namedInput("key"), finder.shapes());
  const CacheSite values = find_cache(attention->namedInput("value"), finder.shapes());
  layer.cache = keys.kind;
  sites.new_tokens_last = keys.new_tokens_last && values.new_tokens_last;
  if (keys.kind != values.kind) {
    reason = c10::str("its keys have a ", to_string(keys.kind), " cache, its values a ", to_string(values.kind),
                      " one; keep both in the same way");
  }
  const bool is_one_tensor =  // what is attended to is no cache of keys and values, but something to pool
      keys.kind == CacheKind::kFilled &&
      strip_layout(attention->namedInput("key")) == strip_layout(attention->namedInput("value"));
  if (is_one_tensor) {
    reason = "no linear projection leads to its key";
  }
  if (keys.kind == CacheKind::kFilled && reason.empty() &&
      caches_are_written({attention->namedInput("key"), attention->namedInput("value")})) {
    reason =
        "its keys or values were taken from a cache before something writes into the cache; read it behind the write";
  }
  return reason.empty();
}

bool has_grouped_heads(const Node* attention) {
  const auto grouped = attention->schema().argumentIndexWithName("enable_gqa");
  const auto constant = grouped ? resolve_constant(attention->input(*grouped)) : std::nullopt;
  return grouped && !(constant && constant->isBool() && !constant->toBool());
}

// Finds the projections behind keys and values. What another pass has put into a cache has none here.
bool find_keys_and_values(SiteFinder& finder, Node* attention, Layer& layer, LayerSites& sites, std::string& reason) {
  if (layer.cache == CacheKind::kFilled) {
    layer.notes.emplace_back(
        "its keys and values come from a cache that another pass has filled: a LoRA on k or v acts in that pass");
    return true;
  }
  return find_projection(finder, attention->namedInput("key"), "key", layer.key, sites.key, layer, reason) &&
         find_projection(finder, attention->namedInput("value"), "value", layer.value, sites.value, layer, reason);
}

// Whether the heads are all that the projection of the queries makes.
bool are_heads_of_query(const Layer& layer, std::string& reason) {
  const bool fits = !layer.query || layer.query->out_features == layer.num_heads * layer.head_dim;
  if (!fits) {
    reason = c10::str("its queries have ", layer.num_heads, " heads of ", layer.head_dim, " features, and ",
                      layer.query->path, " makes ", layer.query->out_features,
                      ": what looks like heads may be windows or several views of a row");
  }
  return fits;
}

// Makes the block of `attention` the layer's home, unless a loop is around it.
bool enter_home(SiteFinder& finder, Node* attention, std::string& reason) {
  for (const Node* owner = attention->owningBlock()->owningNode(); owner; owner = owner->owningBlock()->owningNode()) {
    if (owner->kind() != c10::prim::If) {
      reason = "it is inside a loop";
      return false;
    }
  }
  finder.home() = attention->owningBlock();
  return true;
}

// Whether a term of queries or keys is added to the scores, as where they meet embeddings of distances.
bool has_relative_scores(Node* attention, const LayerSites& sites) {
  std::vector<Value*> projected = {sites.query.node->output()};
  if (sites.key.node) {
    projected.push_back(sites.key.node->output());
  }
  Value* mask = attention->namedInput("attn_mask");
  return !is_none(mask) && depends_on(mask, projected);
}

}  // namespace

bool find_attention(SiteFinder& finder, Node* attention, Layer& layer, LayerSites& sites, std::string& reason) {
  if (!enter_home(finder, attention, reason)) {
    return false;
  }
  // Shapes flow from the projections: visit those first, so that their assumptions are known.
  for (const char* input : {"query", "key", "value"}) {
    for (Node* linear : nearest_linears(attention->namedInput(input))) {
      finder.shapes().shape(linear->output());
    }
  }
  const auto query = finder.shapes().shape(attention->namedInput("query"));
  if (!has_grouped_heads(attention)) {  // whose number only the cache tells
    assume_heads(attention->namedInput("key"), query, /*is_transposed=*/false, finder.shapes());
    assume_heads(attention->namedInput("value"), query, /*is_transposed=*/false, finder.shapes());
  }
  const auto key = finder.shapes().shape(attention->namedInput("key"));
  const bool visible = query && key && query->size() == 4 && key->size() == 4 && (*query)[1].is_constant() &&
                       (*query)[3].is_constant() && (*key)[1].is_constant();
  if (!visible) {
    const bool is_query = !query || query->size() != 4 || !(*query)[1].is_constant() || !(*query)[3].is_constant();
    reason = c10::str("its ", is_query ? "queries" : "keys", ", which ",
                      maker_of(attention->namedInput(is_query ? "query" : "key")),
                      " makes, cannot be seen to have the shape [batch, heads, tokens, head size]; view them with "
                      "numbers for heads and head size");
    return false;
  }
  finder.shapes().assume_equal((*query)[0], (*key)[0]);
  finder.batch() = finder.shapes().canonical((*query)[0]);
  layer.num_heads = (*query)[1].factor;
  layer.num_kv_heads = (*key)[1].factor;
  layer.head_dim = (*query)[3].factor;
  layer.has_attention_mask = !is_none(attention->namedInput("attn_mask"));
  sites.attention = attention;
  if (!find_projection(finder, attention->namedInput("query"), "query", layer.query, sites.query, layer, reason) ||
      !find_caches(finder, attention, layer, sites, reason) ||
      !find_keys_and_values(finder, attention, layer, sites, reason)) {
    return false;
  }
  if (!are_heads_of_query(layer, reason)) {
    return false;
  }
  note_shared_maps(layer, sites);
  layer.has_relative_scores = has_relative_scores(attention, sites);
  const auto input = finder.shapes().shape(linear_input(sites.query.node));
  if (!input || !input->back().is_constant()) {
    reason = "the width of the input of its query projection is not known";
    return false;
  }
  layer.hidden_size = input->back().factor;
  Value* source = linear_input(sites.query.node);
  const auto kept =
      sites.key.node ? cache_of_inputs(linear_input(sites.key.node), source, finder.shapes()) : std::nullopt;
  layer.kind = kept ? AttentionKind::kSelf : AttentionKind::kCross;
  if (layer.cache == CacheKind::kNone && kept && *kept != CacheKind::kNone) {
    layer.cache = *kept;
    sites.keeps_inputs = true;
  }
  return true;
}

}  // namespace torchgraft
