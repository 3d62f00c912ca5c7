#include <torchgraft/patch/module/merge_places.h>

#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/inline_all.h>
#include <torchgraft/patch/graph/module_methods.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/graph/tensor_reads.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/patch/module/exported_methods.h>

#include <torch/csrc/jit/api/function_impl.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <tuple>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Function;
using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;

// One run of a LoRA: `linear` with the update of module `place.module`.
struct LoraRun {
  Node* linear = nullptr;
  MergePlace place;
};

int64_t first_row(const MergePlace& place) {
  return place.weight.first_row + (place.site.is_part ? place.site.offset : 0);
}

// The rows of a weight, and the module whose update they get. Counted as the linear map's outputs.
using Update = std::tuple<int64_t, int64_t, size_t>;  // first row, rows, module

Update update_of(const MergePlace& place) { return {first_row(place), place.out_features, place.module}; }

// All runs of the adapter's modules, also of layers that run again, and where a weight is applied elsewhere too.
std::vector<LoraRun> lora_runs(const Adapter& adapter, const GraphSites& sites, const Module& module) {
  std::vector<LoraRun> result;
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const PlannedModule& planned = adapter.plan[m];
    const int64_t out_features = std::get<PlannedLoRA>(planned.method).out_features;
    const auto add = [&](const LinearSite& site) {
      TORCH_CHECK(!site.is_lookup,
                  "merge_adapter: a LoRA on an embedding is not merged; run the adapter unmerged, or "
                  "merge it with the library that trained it before the model is traced");
      const BaseWeight weight = base_weight(site, module);
      TORCH_CHECK(
          weight.packed.empty(), "merge_adapter: the weight that ", planned.site, " of layer ", planned.number,
          " updates is packed ", weight.packed, " (", weight.path.empty() ? "a constant" : weight.path,
          "), which would round the update away; run the adapter unmerged, or merge it into the base in float32 "
          "and quantise the result");
      TORCH_CHECK(weight.tensor.defined() && !weight.path.empty(), "merge_adapter: the weight that ", planned.site,
                  " of layer ", planned.number,
                  " updates is no parameter of the module (was the module frozen?), or the graph computes which of "
                  "its rows are used; merge before torch.jit.freeze");
      TORCH_CHECK(weight.tensor.dim() == 2, "merge_adapter: the weight ", weight.path, ", which ", planned.site,
                  " of layer ", planned.number, " updates, is stored with ", weight.tensor.dim(),
                  " dimensions; only matrices can be merged");
      result.push_back({site.node, {m, site, weight, out_features}});
    };
    for (size_t i = 0; i < sites.layers.size(); ++i) {
      const Layer& layer = sites.structure.layers[i];
      if (layer.shares.value_or(layer.index) == planned.layer) {
        const LinearSite& site = *lora_site(sites.layers[i], planned.site);
        add(site);
        for (Node* other : site.elsewhere) {
          add({other});
        }
      }
    }
  }
  return result;
}

// "aten::linear at model.py:12, which reads it as k.weight, for aten::tanh at model.py:12". A trace has no better place
// for a linear map than the line in torch.nn, so its first user says more.
std::string described_linear(const Node* linear, const std::string& path, const Module& module) {
  std::string result = described(linear);
  const std::string other = weight_source(linear->namedInput("weight"), module).path;
  if (other != path) {
    result += ", which reads it as " + other;
  }
  std::vector<torch::jit::Use> uses = data_uses(linear->output());
  while (uses.size() == 1 && is_layout(uses[0].user)) {
    uses = data_uses(uses[0].user->output());
  }
  return uses.empty() ? result : result + ", for " + described(uses[0].user);
}

// The rows [begin, end) of its weight's source that a linear map reads; all when they are not known.
std::pair<int64_t, int64_t> rows_read(const Node* linear, SymbolicShapes& shapes, const Module& module) {
  constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  const torch::jit::Value* weight = const_cast<Node*>(linear)->namedInput("weight");
  const WeightSource source = known_rows(weight, shapes, module);
  const auto shape = shapes.shape(weight);
  if (!source.tensor.defined() || !shape || shape->empty() || !shape->front().is_constant()) {
    return {0, kAll};
  }
  const int64_t begin = source.first_row.value_or(0);
  return {begin, begin + shape->front().factor};
}

// The updates that rows [begin, end) of `weight` get.
std::multiset<Update> updates_of_rows(const std::vector<MergePlace>& places, const c10::TensorImpl* weight,
                                      int64_t begin, int64_t end) {
  std::multiset<Update> result;
  for (const MergePlace& place : places) {
    const bool reaches = place.weight.tensor.unsafeGetTensorImpl() == weight && first_row(place) < end &&
                         first_row(place) + place.out_features > begin;
    if (reaches) {
      result.insert(update_of(place));
    }
  }
  return result;
}

// Which tensors each method reads that a host calls beside forward. What forward reads for a method that calls it does
// not count.
std::map<std::string, std::set<const c10::TensorImpl*>> reads_of_methods(const Module& module) {
  std::map<std::string, std::set<const c10::TensorImpl*>> result;
  if (module.get_methods().size() < 2) {
    return result;
  }
  const std::set<std::string> parts = called_by_forward(module);
  Module copy = clone_module(module);
  const auto schema = copy.get_method("forward").function().getSchema();
  const auto stub = std::make_shared<Graph>();
  for (const c10::Argument& argument : schema.arguments()) {
    stub->addInput(argument.name())->setType(argument.type());
  }
  Node* unknown = stub->insertNode(stub->createUninitialized(schema.returns()[0].type()));
  stub->registerOutput(unknown->output());
  remove_method(copy, "forward");
  add_method(copy, "forward", stub, schema.arguments(), schema.returns());
  for (const auto& method : copy.get_methods()) {
    const auto* function = torch::jit::tryToGraphFunction(method.function());
    if (function && !parts.count(method.name())) {
      const auto graph = method.graph()->copy();
      inline_all(*graph);
      for (const auto& [tensor, reads] : tensor_reads(*graph, module)) {
        result[method.name()].insert(tensor);
      }
    }
  }
  return result;
}

}  // namespace

std::vector<MergePlace> merge_places(const Adapter& adapter, const GraphSites& sites, const Module& module) {
  std::vector<MergePlace> result;
  std::set<std::pair<const c10::TensorImpl*, Update>> seen;
  for (LoraRun& run : lora_runs(adapter, sites, module)) {
    if (seen.emplace(run.place.weight.tensor.unsafeGetTensorImpl(), update_of(run.place)).second) {
      result.push_back(std::move(run.place));
    }
  }
  return result;
}

void check_places_are_all(const std::vector<MergePlace>& places, const Adapter& adapter, const GraphSites& sites,
                          Graph& graph, const Module& module) {
  std::map<const Node*, std::multiset<Update>> acting;
  for (const LoraRun& run : lora_runs(adapter, sites, module)) {
    acting[run.linear].insert(update_of(run.place));
  }
  const auto reads = tensor_reads(graph, module);
  const auto method_reads = reads_of_methods(module);
  SymbolicShapes shapes(module);
  for (const MergePlace& place : places) {
    const PlannedModule& planned = adapter.plan[place.module];
    const c10::TensorImpl* weight = place.weight.tensor.unsafeGetTensorImpl();
    const auto refuse = [&](const std::string& where) {
      TORCH_CHECK(false, "merge_adapter: the weight ", place.weight.path, ", which ", planned.site, " of layer ",
                  planned.number, " updates, is used where '", adapter.name, "' does not act in the same way: ", where,
                  ". Merged, it would change that too; run the adapter unmerged, or give the two uses weights of "
                  "their own");
    };
    const TensorReads& uses = reads.at(weight);
    if (!uses.others.empty()) {
      refuse(described(uses.others.front()));
    }
    for (const Node* linear : uses.linears) {
      const auto [begin, end] = rows_read(linear, shapes, module);
      if (updates_of_rows(places, weight, begin, end) != acting[linear]) {
        refuse(described_linear(linear, place.weight.path, module));
      }
    }
    for (const auto& [name, read] : method_reads) {
      if (read.count(weight)) {
        refuse("the method '" + name + "'");
      }
    }
  }
}

}  // namespace torchgraft
