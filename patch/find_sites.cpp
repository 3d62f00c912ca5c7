#include <torchgraft/patch/find_sites.h>

#include <torchgraft/patch/graph_utils.h>

#include <algorithm>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

bool is_norm(const Node* node) { return is_aten(node, {"layer_norm", "rms_norm"}); }

// "encoder.layer.0.attention.self.query" for the weight "encoder.layer.0.attention.self.query.weight", and
// "layers.0.self_attn.in_proj" for "layers.0.self_attn.in_proj_weight".
std::string module_path(const Value* weight, const Module& module) {
  const auto attribute = resolve_attribute(weight, module);
  if (!attribute) {
    return "";
  }
  std::string path = attribute->path;
  for (const std::string suffix : {".weight", "_weight"}) {
    if (path.size() > suffix.size() && path.compare(path.size() - suffix.size(), suffix.size(), suffix) == 0) {
      path.resize(path.size() - suffix.size());
      break;
    }
  }
  return path;
}

class SiteFinder {
 public:
  SiteFinder(const CanonicalGraph& canonical, const Module& module)
      : graph_(*canonical.graph), module_(module), shapes_(module) {}

  void add_layer(Node* attention, GraphSites& sites);

 private:
  bool find_attention(Node* attention, Layer& layer, LayerSites& sites, std::string& reason);
  bool find_projection(Value* heads, Projection& projection, LinearSite& site, std::string& reason);
  bool find_packed_columns(Value* heads, Projection& projection, std::string& reason);
  void find_attention_residual(Layer& layer, LayerSites& sites);
  void find_feed_forward(Layer& layer, LayerSites& sites);
  std::optional<ResidualSite> find_residual(Value* branch);
  std::optional<LinearSite> linear_behind(Value* value, bool through_any_op);
  Projection describe(const LinearSite& site);
  bool layout_of(Value* tokens, bool& sequence_first);

  Graph& graph_;
  const Module& module_;
  SymbolicShapes shapes_;
  Dim batch_;
};

// Whether `tokens`, of rank 3, has the batch first or second; false when it is neither.
bool SiteFinder::layout_of(Value* tokens, bool& sequence_first) {
  const auto shape = shapes_.shape(tokens);
  if (!shape || shape->size() != 3) {
    return false;
  }
  sequence_first = !((*shape)[0] == batch_);
  return !sequence_first || (*shape)[1] == batch_;
}

Projection SiteFinder::describe(const LinearSite& site) {
  Projection result;
  const at::Tensor weight = resolve_tensor(site.node->input(1), module_);
  if (weight.defined() && weight.dim() == 2) {
    result.out_features = weight.size(0);
    result.in_features = weight.size(1);
  }
  result.path = module_path(site.node->input(1), module_);
  return result;
}

// Which columns of a packed projection `heads` takes: it reaches them by one select, chunk, split or slice.
bool SiteFinder::find_packed_columns(Value* heads, Projection& projection, std::string& reason) {
  const auto head_shape = shapes_.shape(heads);
  const int64_t width = (*head_shape)[1].factor * (*head_shape)[3].factor;
  if (width == projection.out_features) {
    return true;
  }
  const int64_t pieces = width > 0 ? projection.out_features / width : 0;
  if (pieces * width != projection.out_features) {
    reason = c10::str("its projection ", projection.path, " has ", projection.out_features, " columns, of which ",
                      width, " are taken in a way that is not recognised");
    return false;
  }
  std::optional<int64_t> piece;
  for (Value* current = heads; !is_aten(current->node(), {"linear"});) {
    Node* node = current->node();
    const auto from = node->inputs().empty() ? std::nullopt : shapes_.shape(node->input(0));
    if (is_aten(node, {"select"})) {
      piece = constant_int(node->input(2));
    } else if (node->kind() == c10::prim::ListUnpack) {
      piece = static_cast<int64_t>(current->offset());
      current = node->input();
      node = current->node();
    } else if (node->kind() == c10::aten::__getitem__) {
      piece = constant_int(node->input(1));
      current = node->input(0);
      node = current->node();
    } else if (is_aten(node, {"slice", "narrow"}) && constant_int(node->input(2)).value_or(0) % width == 0) {
      piece = constant_int(node->input(2)).value_or(0) / width;
    } else if (is_aten(node, {"view", "reshape", "unflatten", "_unsafe_view"})) {
      // [..., pieces, h, d] keeps each projection's columns together; [..., h, pieces, d] interleaves them.
      const auto to = shapes_.shape(current);
      const Dim count{pieces, {}};
      const auto at = to ? std::find(to->begin(), to->end(), count) : Shape::const_iterator();
      const bool splits = from && to && to->size() > from->size() && at != to->end();
      Dim behind;
      for (auto dim = at; splits && ++dim != to->end();) {
        behind = behind * *dim;
      }
      if (splits && !(behind == Dim{width, {}})) {
        reason = "queries, keys and values are interleaved head by head in " + projection.path +
                 ", which is not supported yet";
        return false;
      }
    }
    if (node->inputs().empty()) {
      break;
    }
    current = node->input(0);
  }
  if (!piece || *piece < 0 || *piece >= pieces) {
    reason = "it is not clear which columns of " + projection.path + " it takes";
    return false;
  }
  projection.packed = true;
  projection.offset = *piece * width;
  projection.out_features = width;
  return true;
}

bool SiteFinder::find_projection(Value* heads, Projection& projection, LinearSite& site, std::string& reason) {
  const auto linears = nearest_linears(heads);
  if (linears.size() != 1) {
    reason = linears.empty() ? "no linear projection leads to it" : "several linear maps lead to it";
    return false;
  }
  site.node = linears.front();
  if (site.node->owningBlock() != graph_.block()) {
    reason = "its projection is inside a branch or a loop";
    return false;
  }
  projection = describe(site);
  if (projection.out_features == 0) {
    reason = "the weight of its projection is computed, not a parameter";
    return false;
  }
  if (!layout_of(site.node->input(0), site.sequence_first)) {
    reason = "the input of " + projection.path + " is not of shape [batch, tokens, features] (or tokens first)";
    return false;
  }
  return find_packed_columns(heads, projection, reason);
}

bool SiteFinder::find_attention(Node* attention, Layer& layer, LayerSites& sites, std::string& reason) {
  if (attention->owningBlock() != graph_.block()) {
    reason = "it is inside a branch or a loop";
    return false;
  }
  // Shapes flow from the projections: visit them first so that what they assume is known.
  nearest_linears(attention->input(0));
  const auto query = shapes_.shape(attention->input(0));
  const auto key = shapes_.shape(attention->input(1));
  const bool visible = query && key && query->size() == 4 && key->size() == 4 && (*query)[1].is_constant() &&
                       (*query)[3].is_constant() && (*key)[1].is_constant();
  if (!visible) {
    reason = "its queries and keys are not visibly of shape [batch, heads, tokens, head size]";
    return false;
  }
  batch_ = (*query)[0];
  layer.num_heads = (*query)[1].factor;
  layer.num_kv_heads = (*key)[1].factor;
  layer.head_dim = (*query)[3].factor;
  layer.has_attention_mask = !is_none(attention->input(3));
  sites.attention = attention;
  layer.query.emplace();
  layer.key.emplace();
  layer.value.emplace();
  if (!find_projection(attention->input(0), *layer.query, sites.query, reason) ||
      !find_projection(attention->input(1), *layer.key, sites.key, reason) ||
      !find_projection(attention->input(2), *layer.value, sites.value, reason)) {
    return false;
  }
  layer.hidden_size = layer.query->in_features;
  const bool same_input = strip_layout(sites.query.node->input(0)) == strip_layout(sites.key.node->input(0));
  layer.kind = same_input ? AttentionKind::kSelf : AttentionKind::kCross;
  return true;
}

// The one linear map that `value` flows into: through rearrangements only, or through any element-wise op.
std::optional<LinearSite> SiteFinder::linear_behind(Value* value, bool through_any_op) {
  std::vector<Node*> found;
  std::vector<Value*> frontier = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const auto& use : data_uses(frontier[i])) {
      Node* user = use.user;
      if (is_aten(user, {"linear"}) && use.offset == 0) {
        found.push_back(user);
        continue;
      }
      const bool passes = is_layout(user) || is_aten(user, {"dropout"}) ||
                          (through_any_op && user->kind().is_aten() && !is_norm(user) &&
                           !is_aten(user, {"scaled_dot_product_attention", "matmul", "bmm"}));
      if (!passes || user->outputs().size() != 1) {
        return std::nullopt;
      }
      if (std::find(frontier.begin(), frontier.end(), user->output()) == frontier.end()) {
        frontier.push_back(user->output());
      }
    }
  }
  if (found.size() != 1 || found.front()->owningBlock() != graph_.block()) {
    return std::nullopt;
  }
  LinearSite site{found.front(), false};
  layout_of(site.node->input(0), site.sequence_first);
  return site;
}

// The add that `branch` flows into, through dropout and rearrangements.
std::optional<ResidualSite> SiteFinder::find_residual(Value* branch) {
  while (true) {
    const auto uses = data_uses(branch);
    if (uses.size() != 1 || uses[0].user->owningBlock() != graph_.block()) {
      return std::nullopt;
    }
    Node* user = uses[0].user;
    if (is_aten(user, {"add"}) && uses[0].offset < 2) {
      ResidualSite site{user, uses[0].offset};
      const bool unit_alpha = user->inputs().size() < 3 || constant_double(user->input(2)) == 1.0;
      const bool adds_tensors = site.residual()->type()->isSubtypeOf(*c10::TensorType::get());
      if (!unit_alpha || !adds_tensors || !layout_of(user->output(), site.sequence_first)) {
        return std::nullopt;
      }
      return site;
    }
    if (!is_layout(user) && !is_aten(user, {"dropout"})) {
      return std::nullopt;
    }
    branch = user->output();
  }
}

// The norm order of a block that reads `input` and adds to `residual`.
NormOrder norm_order(Value* input, Value* residual) {
  input = strip_layout(input);
  residual = strip_layout(residual);
  if (is_norm(input->node()) && strip_layout(input->node()->input(0)) == residual) {
    return NormOrder::kPre;
  }
  return input == residual ? NormOrder::kPost : NormOrder::kNone;
}

Node* only_norm_of(Value* sum) {
  Node* norm = nullptr;
  for (const auto& use : data_uses(sum)) {
    if (is_norm(use.user) && use.offset == 0) {
      if (norm) {
        return nullptr;
      }
      norm = use.user;
    }
  }
  return norm;
}

void SiteFinder::find_attention_residual(Layer& layer, LayerSites& sites) {
  sites.output = linear_behind(sites.attention->output(), /*through_any_op=*/false);
  if (!sites.output) {
    layer.notes.push_back("no output projection follows the attention");
    return;
  }
  layer.output = describe(*sites.output);
  sites.attention_residual = find_residual(sites.output->node->output());
  if (!sites.attention_residual) {
    layer.notes.push_back("no residual add follows " + layer.output->path);
    return;
  }
  ResidualSite& residual = *sites.attention_residual;
  layer.has_attention_residual = true;
  layer.norm_order = norm_order(sites.query.node->input(0), residual.residual());
  Node* norm = only_norm_of(residual.add->output());
  if (layer.norm_order == NormOrder::kPost && norm) {
    residual.norm = norm;
  } else if (layer.norm_order == NormOrder::kPost) {
    layer.norm_order = NormOrder::kNone;
  }
}

void SiteFinder::find_feed_forward(Layer& layer, LayerSites& sites) {
  if (!sites.attention_residual) {
    return;
  }
  Value* sum = sites.attention_residual->add->output();
  Node* norm = only_norm_of(sum);
  Value* block_input = norm ? norm->output() : sum;
  Value* expected_residual = layer.norm_order == NormOrder::kPre ? sum : block_input;
  for (const auto& use : data_uses(block_input)) {
    if (!is_aten(use.user, {"linear"}) || use.offset != 0 || use.user->owningBlock() != graph_.block()) {
      continue;
    }
    const auto out = linear_behind(use.user->output(), /*through_any_op=*/true);
    const auto residual = out ? find_residual(out->node->output()) : std::nullopt;
    if (!residual || strip_layout(residual->residual()) != strip_layout(expected_residual)) {
      continue;
    }
    if (sites.ffn_in) {  // a second way in: a gated feed-forward
      layer.notes.push_back("its feed-forward block has two input projections, which is not supported yet");
      sites.ffn_in = sites.ffn_out = std::nullopt;
      sites.ffn_residual = std::nullopt;
      layer.ffn_in = layer.ffn_out = std::nullopt;
      layer.has_ffn_residual = false;
      return;
    }
    sites.ffn_in = LinearSite{use.user, false};
    layout_of(use.user->input(0), sites.ffn_in->sequence_first);
    sites.ffn_out = out;
    sites.ffn_residual = residual;
    layer.ffn_in = describe(*sites.ffn_in);
    layer.ffn_out = describe(*sites.ffn_out);
    layer.has_ffn_residual = true;
    if (layer.norm_order == NormOrder::kPost) {
      sites.ffn_residual->norm = only_norm_of(residual->add->output());
    }
  }
  if (!layer.has_ffn_residual) {
    layer.notes.push_back("no feed-forward block (linear, activation, linear, residual add) follows its attention");
  }
}

void SiteFinder::add_layer(Node* attention, GraphSites& result) {
  Layer layer;
  LayerSites sites;
  std::string reason;
  if (!find_attention(attention, layer, sites, reason)) {
    const auto linears = nearest_linears(attention->input(0));
    const std::string where = linears.empty() ? "" : module_path(linears.front()->input(1), module_);
    result.structure.near_misses.push_back("attention" + (where.empty() ? "" : " behind " + where) +
                                           " was left out: " + reason);
    return;
  }
  layer.index = static_cast<int64_t>(result.layers.size());
  find_attention_residual(layer, sites);
  find_feed_forward(layer, sites);
  result.structure.layers.push_back(std::move(layer));
  result.layers.push_back(std::move(sites));
}

}  // namespace

GraphSites find_sites(const CanonicalGraph& canonical, const Module& module) {
  GraphSites result;
  SiteFinder finder(canonical, module);
  for_each_node(canonical.graph->block(), [&](Node* node) {
    if (is_aten(node, {"scaled_dot_product_attention"})) {
      finder.add_layer(node, result);
    }
  });
  for (const UnloweredSoftmax& miss : canonical.unlowered) {
    const auto linears = nearest_linears(miss.softmax->input(0));
    const std::string where = linears.empty() ? "" : module_path(linears.front()->input(1), module);
    result.structure.near_misses.push_back("a softmax" + (where.empty() ? "" : " behind " + where) +
                                           " was not taken for attention: " + miss.reason);
  }
  return result;
}

}  // namespace torchgraft
