#include <torchgraft/patch/sites/find_embeddings.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/sites/find_residual.h>

#include <algorithm>
#include <unordered_set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Node;
using torch::jit::Value;

// The embedding lookups that `value` is computed from.
std::vector<Node*> lookups_behind(Value* value) {
  std::vector<Node*> lookups;
  std::unordered_set<const Value*> seen = {value};
  std::vector<Value*> frontier = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    Node* node = frontier[i]->node();
    if (is_aten(node, {"embedding"})) {
      lookups.push_back(node);
      continue;
    }
    for (Value* input : node->inputs()) {
      if (seen.insert(input).second) {
        frontier.push_back(input);
      }
    }
  }
  return lookups;
}

// The index of the first layer whose stream begins with embeddings; nullopt in a decoder without its encoder.
std::optional<size_t> first_layer(const Structure& structure) {
  const auto first_of = [&](AttentionKind kind) {
    const auto found = std::find_if(structure.layers.begin(), structure.layers.end(),
                                    [&](const Layer& layer) { return layer.kind == kind; });
    return found == structure.layers.end() ? std::nullopt : std::optional<size_t>(found - structure.layers.begin());
  };
  if (const auto encoder = first_of(AttentionKind::kEncoder)) {
    return encoder;
  }
  return first_of(AttentionKind::kCross) ? std::nullopt : first_of(AttentionKind::kSelf);
}

// `value` behind the dropout that is its only reader.
Value* behind_dropout(Value* value) {
  for (auto uses = data_uses(value); uses.size() == 1 && is_aten(uses[0].user, {"dropout"}) && uses[0].offset == 0;
       uses = data_uses(value)) {
    value = uses[0].user->output();
  }
  return value;
}

// The rows of the largest table that tokens of forward's arguments are looked up in; 0 when there is none. Tables of
// positions are looked up by computed numbers.
int64_t vocabulary_of(SiteFinder& finder, Value* embeddings) {
  int64_t result = 0;
  for (Node* lookup : lookups_behind(embeddings)) {
    const auto table = finder.shapes().shape(lookup->namedInput("weight"));
    const bool is_of_argument = strip_passive(lookup->namedInput("indices"))->node()->kind() == c10::prim::Param;
    if (is_of_argument && table && !table->empty() && table->front().is_constant()) {
      result = std::max(result, table->front().factor);
    }
  }
  return result;
}

// Whether forward gives back what `node` computes, changed by no other linear map or attention.
bool is_last(Node* node) {
  std::unordered_set<const Value*> seen = {node->output()};
  std::vector<Value*> frontier = {node->output()};
  for (size_t i = 0; i < frontier.size(); ++i) {
    for (const torch::jit::Use& use : frontier[i]->uses()) {
      if (use.user->kind() == c10::prim::Return) {
        return true;
      }
      if (is_linear(use.user) || is_aten(use.user, {"scaled_dot_product_attention", "matmul", "bmm"})) {
        continue;
      }
      for (Value* output : use.user->outputs()) {
        if (seen.insert(output).second) {
          frontier.push_back(output);
        }
      }
    }
  }
  return false;
}

bool is_in_layer(const GraphSites& sites, const Node* node) {
  return std::any_of(sites.layers.begin(), sites.layers.end(), [&](const LayerSites& layer) {
    return layer.query.node == node || layer.key.node == node || layer.value.node == node;
  });
}

struct Outputs {
  std::vector<Node*> to_vocabulary;  // linear maps of tokens
  std::vector<Node*> others;         // the last ones to more outputs than they read features
};

Outputs output_embeddings(SiteFinder& finder, torch::jit::Graph& graph, const GraphSites& sites, int64_t size,
                          int64_t vocabulary) {
  Outputs found;
  for (Node* node : graph.nodes()) {
    bool sequence_first = false;
    if (!is_linear(node) || !finder.layout_of(linear_input(node), sequence_first)) {
      continue;
    }
    const Projection projection = finder.describe(node);
    if (projection.in_features != size) {
      continue;
    }
    if (vocabulary > 0 && projection.out_features == vocabulary) {
      found.to_vocabulary.push_back(node);
    } else if (projection.out_features > size && !is_in_layer(sites, node) && is_last(node)) {
      found.others.push_back(node);
    }
  }
  return found;
}

std::string paths_of(SiteFinder& finder, const std::vector<Node*>& nodes) {
  std::string paths;
  for (Node* node : nodes) {
    paths += (paths.empty() ? "" : ", ") + finder.path_of(node);
  }
  return paths;
}

// Why there are none; empty when they were found.
std::string embeddings_of(SiteFinder& finder, const std::shared_ptr<torch::jit::Graph>& graph, GraphSites& sites) {
  const auto first = first_layer(sites.structure);
  if (!first) {
    return "it is a decoder alone, and invertible adapters act on the embeddings of the encoder";
  }
  const Layer& layer = sites.structure.layers[*first];
  const auto& residual = sites.layers[*first].attention_residual;
  if (!residual || layer.norm_order == NormOrder::kNone) {
    return "the residual stream of its first layer was not found";
  }
  EmbeddingSite site;
  site.value = strip_passive(residual->residual);
  int64_t size = layer.hidden_size;
  if (is_linear(site.value->node()) && !lookups_behind(linear_input(site.value->node())).empty()) {
    size = finder.describe(site.value->node()).in_features;
    site.value = strip_passive(linear_input(site.value->node()));
  }
  site.value = behind_dropout(site.value);
  if (const auto query = finder.shapes().shape(sites.layers[*first].attention->namedInput("query"))) {
    finder.batch() = query->front();
  }
  Value* read = streams_of(linear_input(sites.layers[*first].query.node)).front();
  const auto shape = finder.shapes().shape(read);
  if (shape && is_norm(read->node()) && strip_passive(read->node()->namedInput("input")) == strip_passive(site.value) &&
      !finder.shapes().shape(site.value)) {
    finder.shapes().assume(site.value, *shape);  // an argument of forward has the shape of its norm's result
  }
  const bool is_input = site.value->node()->kind() == c10::prim::Param;
  if ((!is_input && !finder.is_top_level(site.value->node())) || !finder.layout_of(site.value, site.sequence_first)) {
    return "what its first layer reads is no [batch, tokens, features] at the top of the graph";
  }
  if (Writes(graph).reach(site.value)) {
    return "something may write in place into its embeddings";
  }
  const Outputs outputs = output_embeddings(finder, *graph, sites, size, vocabulary_of(finder, site.value));
  if (outputs.to_vocabulary.size() > 1) {
    sites.structure.several_outputs = paths_of(finder, outputs.to_vocabulary);
  } else if (outputs.to_vocabulary.empty()) {
    sites.structure.other_outputs = paths_of(finder, outputs.others);
  } else {
    site.output = outputs.to_vocabulary.front();
    finder.layout_of(linear_input(site.output), site.output_is_sequence_first);
  }
  sites.structure.embedding_size = size;
  sites.structure.has_output_embeddings = site.output != nullptr;
  sites.embeddings = site;
  return "";
}

}  // namespace

void find_embeddings(SiteFinder& finder, const std::shared_ptr<torch::jit::Graph>& graph, GraphSites& sites) {
  if (!sites.layers.empty()) {
    sites.structure.embedding_note = embeddings_of(finder, graph, sites);
  }
}

}  // namespace torchgraft
