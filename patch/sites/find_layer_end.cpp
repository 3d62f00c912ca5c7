#include <torchgraft/patch/sites/find_layer_end.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/sites/find_residual.h>

#include <algorithm>
#include <unordered_set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// The library keeps positions for the whole of a forward pass: those that the mask gives, or that the first layer with
// ReFT has.
constexpr const char* kStacks =
    "the model has several stacks of layers (towers), and the adapters library takes the positions of one for all; "
    "trace the tower that ReFT is for by itself";

// `node`, or the node of the graph's own block that it stands in.
Node* in_own_block(Node* node, const Graph& graph) {
  while (node->owningBlock() != graph.block()) {
    node = node->owningBlock()->owningNode();
  }
  return node;
}

// The nodes of the graph's own block that compute with `values`, directly or not, without what is computed from `end`.
std::unordered_set<Node*> readers(const std::vector<Value*>& values, const Value* end, const Graph& graph) {
  std::unordered_set<Node*> found;
  std::vector<Value*> frontier = values;
  std::unordered_set<Value*> seen(values.begin(), values.end());
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const auto& use : data_uses(frontier[i])) {
      Node* reader = in_own_block(use.user, graph);
      if (!found.insert(reader).second) {
        continue;
      }
      for (Value* output : reader->outputs()) {
        if (output != end && seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  return found;
}

Value* behind(const ResidualSite& site) { return (site.norm ? site.norm : site.sum)->output(); }

// What may be the end of a layer: what stands behind the later of its two blocks. Null where a norm may still follow.
Value* candidate_of(const Layer& layer, const LayerSites& sites) {
  const bool attention_is_last =
      behind(*sites.attention_residual)->node()->isAfter(behind(*sites.ffn_residual)->node());
  const NormOrder order = attention_is_last ? layer.norm_order : layer.ffn_norm_order;
  return order == NormOrder::kNone ? nullptr
                                   : behind(attention_is_last ? *sites.attention_residual : *sites.ffn_residual);
}

// Why the layer has no end; empty where it has one, which is then entered in it.
std::string enter_end(const Layer& layer, LayerSites& sites, const Graph& graph) {
  if (layer.kind != AttentionKind::kSelf) {
    return "the model has an encoder and a decoder, in which the adapters library counts positions by the encoder's "
           "mask";
  }
  if (layer.cache != CacheKind::kNone) {
    return "the layer keeps keys and values of earlier passes, and positions would be counted anew in each pass";
  }
  if (!sites.attention) {
    return "its attention was not recognised";
  }
  if (sites.attention->owningBlock() != graph.block()) {
    return "its attention stands in a branch of the graph";
  }
  if (!sites.attention_residual || !sites.ffn_residual) {
    return "no feed-forward block that is added to the residual stream was found behind its attention";
  }
  Value* end = candidate_of(layer, sites);
  if (!end) {
    return "it is not known whether a norm follows its feed-forward block";
  }
  std::vector<Value*> inner = {sites.attention->output(), sites.attention_residual->sum->output()};
  inner.push_back(sites.ffn_residual->branch());
  std::erase(inner, end);
  for (Node* reader : readers(inner, end, graph)) {
    if (reader == graph.return_node() || reader->isAfter(end->node())) {
      return "something other than its last sum or norm leaves the layer: " + described(reader);
    }
  }
  sites.end = LayerEnd{end, sites.ffn_residual->sequence_first};
  return "";
}

bool is_read_by(const Value* end, const LayerSites& next) {
  const auto streams = streams_of(linear_input(next.query.node));
  return std::find(streams.begin(), streams.end(), end) != streams.end();
}

// Takes the end of a layer that the next one does not read. Returns whether the next one is of another stack.
bool check_next(Layer& layer, LayerSites& sites, const LayerSites& next, const Graph& graph) {
  if (!sites.end || is_read_by(sites.end->value, next)) {
    return false;
  }
  const bool is_behind = readers({sites.end->value}, nullptr, graph).count(in_own_block(next.query.node, graph)) > 0;
  layer.end_note = is_behind ? "the next layer reads something other than its last sum or norm" : kStacks;
  sites.end.reset();
  return !is_behind;
}

}  // namespace

void find_layer_ends(GraphSites& sites, Graph& graph) {
  std::vector<Layer>& layers = sites.structure.layers;
  bool has_stacks = false;
  for (size_t i = 0; i < layers.size(); ++i) {
    sites.layers[i].end.reset();
    layers[i].end_note = enter_end(layers[i], sites.layers[i], graph);
    if (i + 1 < layers.size()) {
      has_stacks = check_next(layers[i], sites.layers[i], sites.layers[i + 1], graph) || has_stacks;
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    if (has_stacks && sites.layers[i].end) {
      layers[i].end_note = kStacks;
      sites.layers[i].end.reset();
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {  // a layer that runs again has one set of adapters
    const size_t first = layers[i].shares ? sites.structure.position(*layers[i].shares) : i;
    if (!sites.layers[i].end) {
      layers[first].end_note = layers[i].end_note;
      sites.layers[first].end.reset();
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].has_end = sites.layers[i].end.has_value();
  }
}

}  // namespace torchgraft
