#include <torchgraft/patch/sites/find_lookups.h>

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/sites/base_weight.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Node;

std::string table_path(torch::jit::Value* table, const Module& module) {
  return module_path(weight_source(table, module));
}

// The table of an embedding, as a linear map on the numbers of its rows.
Projection describe_lookup(SiteFinder& finder, const Module& module, const Node* lookup) {
  Projection result;
  const auto shape = finder.shapes().shape(lookup->namedInput("weight"));
  if (shape && shape->size() == 2 && (*shape)[0].is_constant() && (*shape)[1].is_constant()) {
    result.in_features = (*shape)[0].factor;
    result.out_features = (*shape)[1].factor;
  }
  result.path = table_path(lookup->namedInput("weight"), module);
  result.is_embedding = true;
  return result;
}

}  // namespace

void find_lookups(SiteFinder& finder, const std::shared_ptr<torch::jit::Graph>& graph, const Module& module,
                  GraphSites& found) {
  if (found.layers.empty()) {
    return;
  }
  std::map<std::string, size_t> reads;
  std::vector<Node*> lookups;
  for_each_node(graph->block(), [&](Node* node) {
    if (is_linear(node)) {
      reads[finder.path_of(node)]++;
    } else if (is_aten(node, {"embedding", "embedding_bag"})) {
      reads[table_path(node->input(0), module)]++;
    } else if (is_aten(node, {"embedding_renorm_", "embedding_renorm"})) {  // max_norm writes into the table
      torch::jit::Value* table = node->input(0);
      while (is_aten(table->node(), {"detach"})) {
        table = table->node()->input(0);
      }
      reads[table_path(table, module)]++;
    }
    if (is_aten(node, {"embedding"})) {
      lookups.push_back(node);
    }
  });
  if (lookups.empty()) {
    return;
  }
  const Writes writes(graph);
  for (Node* node : lookups) {
    const Projection projection = describe_lookup(finder, module, node);
    LinearSite site{node};
    site.is_lookup = true;
    const bool is_plain = node->owningBlock() == graph->block() && !writes.reach(node->namedInput("weight"));
    if (is_plain && finder.layout_of(node->output(), site.sequence_first) && !projection.path.empty() &&
        projection.in_features > 0 && reads.at(projection.path) == 1) {
      found.structure.layers.front().linear_maps.push_back(projection);
      found.layers.front().linear_maps.push_back(site);
    }
  }
}

}  // namespace torchgraft
