#include <torchgraft/patch/quantize.h>

#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/loaded_again.h>
#include <torchgraft/patch/graph/no_warnings.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/exported_methods.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/module_of_graph.h>
#include <torchgraft/patch/module/quantized_maps.h>
#include <torchgraft/patch/module/rename_names.h>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <optional>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;
using torch::jit::WithInsertPoint;

// The base of a module in canonical form, its sites and its linear maps.
struct Base {
  Module module;  // a copy
  CanonicalGraph canonical;
  GraphSites sites;
  std::vector<QuantizedMap> maps;
};

LinearMapReport report_of(const QuantizedMap& map) {
  return {map.path, {map.roles.begin(), map.roles.end()}, map.out_features, map.in_features, map.kept};
}

void check_some(const std::vector<QuantizedMap>& maps) {
  std::map<std::string, size_t> reasons;
  for (const QuantizedMap& map : maps) {
    if (map.kept.empty()) {
      return;
    }
    ++reasons[map.kept];
  }
  std::vector<std::string> lines;
  for (const auto& [reason, count] : reasons) {
    lines.push_back(c10::str(count, count == 1 ? " map: " : " maps: ", reason));
  }
  TORCH_CHECK(false, "quantize: none of the ", maps.size(),
              " linear maps of forward can be quantised:", indented(lines));
}

// Int8 products have no gradients.
void check_is_frozen(const Module& module) {
  if (!is_grafted(module)) {
    return;
  }
  for (const AdapterInfo& info : list_adapters(module)) {
    TORCH_CHECK(!info.trainable, "quantize: '", info.name,
                "' is trainable; train it before the base is quantised, then make it a frozen one (freeze_adapter, "
                "torchgraft freeze)");
  }
}

Base open_base(const Module& module, const QuantizeOptions& options) {
  check_no_hooks(module, "quantize");
  check_is_frozen(module);
  Base result;
  result.module = base_copy(module);
  result.canonical = canonicalise(result.module, "forward");
  result.sites = find_sites(result.canonical, result.module);
  const NoWarnings no_warnings;
  result.maps = quantize_maps(*result.canonical.graph, result.sites, result.module, options.skip);
  check_some(result.maps);
  return result;
}

// Inserts the int8 product of what `map` reads. `weight` becomes the value of the packed weight, a constant.
Value* insert_product(Graph& graph, const QuantizedMap& map, Value*& weight) {
  static const auto kLinear = c10::Symbol::fromQualString("quantized::linear_dynamic");
  weight = graph.insertConstant(map.packed);
  Value* reduce_range = graph.insertConstant(true);  // 7 bits of activations: right on processors without VNNI, too
  return graph.insertNode(graph.create(kLinear, {linear_input(map.node), weight, reduce_range}))->output();
}

Module quantized_base(const Base& base) {
  const auto& graph = base.canonical.graph;
  std::multimap<std::string, NewAttribute> added;
  for (const QuantizedMap& map : base.maps) {
    if (!map.kept.empty()) {
      continue;
    }
    const WithInsertPoint guard(map.node);
    Value* weight = nullptr;
    Value* product = insert_product(*graph, map, weight);
    product->copyMetadata(map.node->output());
    product->node()->copyMetadata(map.node);
    if (!map.attribute.empty()) {
      added.emplace(map.attribute, NewAttribute{weight, map.packed});
    }
    replace_node(map.node, {product});
  }
  const Module result = clone_module(module_of_graph(graph, base.module, added, "quantize"));
  loaded_again(result, "quantize");
  return result;
}

void warn_of_dropped(const Module& module) {
  const std::vector<std::string> methods = exported_methods(module);
  if (!methods.empty()) {
    TORCH_WARN("quantize: the result has forward only, without ", c10::Join(", ", methods));
  }
}

// The adapters of `grafted` on `base`, a module with the same layers.
Module regrafted(const Module& grafted, const Module& base) {
  const Draft old = open_grafted(grafted, "quantize");
  GraftOptions options = old.options;
  options.rename = names_in(base, options.rename);  // it has not all that the module's own base had
  Draft result = open_draft(base, options);
  const size_t wanted = old.sites.structure.layers.size();
  const size_t found = result.sites.structure.layers.size();
  TORCH_INTERNAL_ASSERT(found == wanted, "the int8 base has ", found, " layers, the module ", wanted);
  result.adapters = old.adapters;
  result.compositions = old.compositions;
  result.fusions = old.fusions;
  result.head_mask = old.head_mask;
  return build(std::move(result), active_name(grafted));
}

}  // namespace

Quantized quantize(const Module& module, const QuantizeOptions& options) {
  const Base base = open_base(module, options);
  Quantized result{quantized_base(base), {}};
  std::transform(base.maps.begin(), base.maps.end(), std::back_inserter(result.maps), report_of);
  if (is_grafted(module)) {
    result.module = regrafted(module, result.module);
  }
  warn_of_dropped(is_grafted(module) ? base_copy(module) : module);
  return result;
}

Quantized quantization_probe(const Module& module, const QuantizeOptions& options) {
  const Base base = open_base(module, options);
  const auto& graph = base.canonical.graph;
  Quantized result;
  std::vector<Value*> errors;
  for (const QuantizedMap& map : base.maps) {
    if (!map.kept.empty() || map.node->owningBlock() != graph->block()) {
      continue;
    }
    const WithInsertPoint guard(map.node->next());
    Value* exact = map.node->output();
    Value* weight = nullptr;
    Value* difference = graph->insert(c10::aten::sub, {insert_product(*graph, map, weight), exact});
    const auto norm = [&](Value* value) { return graph->insert(c10::aten::linalg_vector_norm, {value}); };
    errors.push_back(graph->insert(c10::aten::div, {norm(difference), norm(exact)}));
    result.maps.push_back(report_of(map));
  }
  const WithInsertPoint guard(graph->return_node());
  Value* list = graph->insertNode(graph->createList(c10::TensorType::get(), errors))->output();
  graph->eraseOutput(0);
  graph->registerOutput(list);
  result.module = clone_module(module_of_graph(graph, base.module, {}, "quantize"));
  return result;
}

}  // namespace torchgraft
