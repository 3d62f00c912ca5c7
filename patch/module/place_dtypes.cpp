#include <torchgraft/patch/module/place_dtypes.h>

#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/graph/autocast_regions.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/no_warnings.h>

#include <ATen/ATen.h>

#include <optional>
#include <set>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Module;
using torch::jit::Value;

// The dtype of the weight that a linear map multiplies with; nothing where it is not known or no floating point.
std::optional<at::ScalarType> weight_dtype(const torch::jit::Node* linear, const Module& module) {
  Value* weight = linear_weight(linear);
  while ((is_layout(weight->node()) || is_aten(weight->node(), {"t"})) && !is_aten(weight->node(), {"to", "type_as"})) {
    weight = weight->node()->input(0);
  }
  const at::Tensor tensor = resolve_tensor(weight, module);
  const bool is_known = tensor.defined() && at::isFloatingType(tensor.scalar_type()) && !tensor.is_quantized();
  return is_known ? std::optional(tensor.scalar_type()) : std::nullopt;
}

class PlaceDtypes {
 public:
  PlaceDtypes(const GraphSites& sites, const Module& module) : sites_(sites), module_(module) {}

  // The dtype of the linear map on which `planned` is a LoRA; nothing where it is none, or not known.
  std::optional<at::ScalarType> operator()(const PlannedModule& planned) {
    if (!std::holds_alternative<PlannedLoRA>(planned.method)) {
      return std::nullopt;
    }
    const LinearSite* site = lora_site(sites_.layers.at(sites_.structure.position(planned.layer)), planned.site);
    if (!site || !site->node) {
      return std::nullopt;
    }
    if (!under_autocast_) {
      under_autocast_ = nodes_under_autocast(*site->node->owningGraph());
    }
    return under_autocast_->count(site->node) == 0 ? weight_dtype(site->node, module_) : std::nullopt;
  }

 private:
  const GraphSites& sites_;
  const Module& module_;
  std::optional<std::set<const torch::jit::Node*>> under_autocast_;  // of the one graph that all sites are in
};

void cast(ModuleWeights& weights, at::ScalarType dtype) {
  for (auto& [name, tensor] : weights) {
    const bool casts = tensor.defined() && at::isFloatingType(tensor.scalar_type()) && tensor.scalar_type() != dtype;
    tensor = casts ? tensor.detach().to(dtype) : tensor;
  }
}

void check_factors(const Adapter& adapter, size_t m, at::ScalarType dtype, const GraphSites& sites) {
  const PlannedModule& planned = adapter.plan[m];
  if (!has_factors(planned)) {
    return;
  }
  const Layer& layer = sites.structure.layers.at(sites.structure.position(planned.layer));
  for (const auto& [name, tensor] : adapter.weights[m]) {
    TORCH_CHECK(!tensor.defined() || !at::isFloatingType(tensor.scalar_type()) || tensor.scalar_type() == dtype,
                "graft: '", adapter.name, "' has ", planned.location, " in layer ", layer.number,
                " with matrices that all of its layers share, in ", tensor.scalar_type(), ", where the linear map is ",
                dtype, "; leave this map out, use a plain LoRA, or trace the base with all weights in one dtype");
  }
}

}  // namespace

void cast_to_places(std::vector<Adapter>& adapters, const GraphSites& sites, const Module& module) {
  PlaceDtypes dtype_at(sites, module);
  for (Adapter& adapter : adapters) {
    for (size_t m = 0; m < adapter.plan.size(); ++m) {
      if (const auto dtype = dtype_at(adapter.plan[m])) {
        check_factors(adapter, m, *dtype, sites);
        cast(adapter.weights[m], *dtype);
      }
    }
  }
}

Adapter make_placed_adapter(const AdapterSpec& spec, const GraphSites& sites, const Module& module,
                            const at::TensorOptions& options) {
  std::vector<Adapter> made = {make_adapter(spec, sites.structure, options)};
  PlaceDtypes dtype_at(sites, module);
  const auto own = c10::typeMetaToScalarType(options.dtype());
  at::ScalarType widest = own;
  for (const PlannedModule& planned : made[0].plan) {
    widest = c10::promoteTypes(widest, dtype_at(planned).value_or(own));
  }
  if (spec.weights && widest != own) {
    const NoWarnings no_warnings;  // they were said above
    const Adapter wide = make_adapter(spec, sites.structure, options.dtype(widest));
    for (size_t m = 0; m < wide.plan.size(); ++m) {
      if (dtype_at(wide.plan[m]).value_or(own) != own && !has_factors(wide.plan[m])) {
        made[0].weights[m] = wide.weights[m];
      }
    }
  }
  cast_to_places(made, sites, module);
  return std::move(made[0]);
}

}  // namespace torchgraft
