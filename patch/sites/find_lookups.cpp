#include <torchgraft/patch/sites/find_lookups.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/sites/base_weight.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;

// The table of an embedding, as a linear map on the numbers of its rows.
Projection describe_lookup(SiteFinder& finder, const Module& module, const Node* lookup) {
  Projection result;
  const auto shape = finder.shapes().shape(lookup->namedInput("weight"));
  if (shape && shape->size() == 2 && (*shape)[0].is_constant() && (*shape)[1].is_constant()) {
    result.in_features = (*shape)[0].factor;
    result.out_features = (*shape)[1].factor;
  }
  result.path = module_path(weight_source(lookup->namedInput("weight"), module));
  result.is_embedding = true;
  return result;
}

}  // namespace

void find_lookups(SiteFinder& finder, torch::jit::Graph& graph, const Module& module, GraphSites& found) {
  if (found.layers.empty()) {
    return;
  }
  std::map<std::string, size_t> reads;
  std::vector<Node*> lookups;
  for_each_node(graph.block(), [&](Node* node) {
    if (is_linear(node)) {
      reads[finder.path_of(node)]++;
    } else if (is_aten(node, {"embedding", "embedding_renorm_", "embedding_bag"})) {  // max_norm writes into the table
      reads[module_path(weight_source(node->input(0), module))]++;
    }
    if (is_aten(node, {"embedding"})) {
      lookups.push_back(node);
    }
  });
  for (Node* node : lookups) {
    const Projection projection = describe_lookup(finder, module, node);
    LinearSite site{node};
    site.is_lookup = true;
    const bool is_at_top = node->owningBlock() == graph.block();
    if (is_at_top && finder.layout_of(node->output(), site.sequence_first) && !projection.path.empty() &&
        projection.in_features > 0 && reads.at(projection.path) == 1) {
      found.structure.layers.front().linear_maps.push_back(projection);
      found.layers.front().linear_maps.push_back(site);
    }
  }
}

}  // namespace torchgraft
