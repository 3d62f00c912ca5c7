#include <torchgraft/patch/adapters/read_adapters.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/plan/invertible.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/prefix_mlp.h>
#include <torchgraft/plan/reft_weights.h>
#include <torchgraft/plan/reparametrisation.h>

#include <ATen/ATen.h>

#include <cstring>
#include <set>
#include <tuple>

namespace torchgraft {
namespace {

// The shapes of one adapter's weights in one slot, without the bank dimension.
std::map<std::string, std::vector<int64_t>> shapes_of(const PlannedModule& module) {
  std::map<std::string, std::vector<int64_t>> shapes;
  int64_t gates = 0;
  int64_t gate_features = 0;
  if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
    shapes = {{"lora_a", {lora->config.r, lora->in_features}},
              {"lora_b", {lora->out_features, lora->config.r}},
              {"scaling", {}}};
    if (lora_form(lora->config) == LoRAForm::kScale) {
      shapes.erase("lora_a");
    } else if (lora_form(lora->config) == LoRAForm::kDora) {
      for (const char* name : {"magnitude", "weight_norm", "fixed"}) {
        shapes[name] = {lora->out_features};
      }
    }
    if (lora->config.lora_bias) {
      shapes["bias"] = {lora->out_features};
    }
    gates = lora->config.use_gating;
    gate_features = lora->in_features;
  } else if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method)) {
    const int64_t hidden = bottleneck->hidden_size;
    const int64_t size = bottleneck->bottleneck_size;
    const auto* kind = std::get_if<std::string>(&bottleneck->config.scaling);
    shapes = {{"down_weight", {size, hidden}},
              {"down_bias", {size}},
              {"up_weight", {hidden, size}},
              {"up_bias", {hidden}},
              {"scaling", {kind && *kind == "channel" ? hidden : 1}}};
    for (const std::string& norm : own_norms(bottleneck->config)) {
      shapes[norm + "_weight"] = {hidden};
      shapes[norm + "_bias"] = {hidden};
    }
    gates = bottleneck->config.use_gating;
    gate_features = hidden;
  } else if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
    return invertible_shapes(*invertible);
  } else if (const auto* prompt = std::get_if<PlannedPrompt>(&module.method)) {
    return {{"prompt", {prompt->config.prompt_length, prompt->embedding_size}}};
  } else if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
    shapes = reft_shapes(*reft);
  } else {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    const std::vector<int64_t> shape = {prefix.num_kv_heads, prefix.config.prefix_length, prefix.head_dim};
    shapes = {{"prefix_key", shape}, {"prefix_value", shape}};
    gates = prefix.config.use_gating ? (prefix.config.shared_gating ? 1 : 2) : 0;
    gate_features = prefix.hidden_size;
  }
  if (gates > 0) {
    shapes["gate_weight"] = {gates, gate_features};
    shapes["gate_bias"] = {gates};
  }
  return shapes;
}

// The weights of one adapter in one slot: its own ones, the others cut out of the bank (the inverse of
// stack_parameter).
ModuleWeights unstack(const torch::jit::Module& slot, const Adapter& adapter, size_t index,
                      const PlannedModule& module) {
  const std::string own_name = own_module_name(adapter.name);
  const std::optional<torch::jit::Module> own =
      slot.hasattr(own_name) ? std::optional(slot.attr(own_name).toModule()) : std::nullopt;
  const std::set<std::string> computed = computed_weights(adapter, module);
  ModuleWeights weights;
  for (const auto& [name, shape] : shapes_of(module)) {
    if (own && own->hasattr(name)) {
      weights[name] = own->attr(name).toTensor().detach().clone();
      continue;
    }
    if (computed.count(name)) {
      continue;  // compute_weights makes it, or complete_dora for DoRA's norms
    }
    at::Tensor row = slot.attr(name).toTensor().detach()[static_cast<int64_t>(index)];
    for (size_t i = 0; i < shape.size(); ++i) {
      row = row.narrow(static_cast<int64_t>(i), 0, shape[i]);
    }
    weights[name] = row.clone();
  }
  return weights;
}

AdapterWeights read_weights(const torch::jit::Module& adapters_module, const Adapter& adapter, size_t index) {
  AdapterWeights weights;
  for (const PlannedModule& module : adapter.plan) {
    const auto layer = adapters_module.attr("layer_" + std::to_string(module.number)).toModule();
    weights.push_back(unstack(layer.attr(slot_name(adapter, module)).toModule(), adapter, index, module));
  }
  return weights;
}

// Reads what a trainable adapter's weights are computed from.
Reparametrisation read_sources(const torch::jit::Module& adapters_module, const std::string& adapter) {
  Reparametrisation sources;
  const std::string own_name = own_module_name(adapter);
  for (const auto& child : adapters_module.named_children()) {
    if (!child.name.ends_with(kSourceSuffix) || !child.value.hasattr(own_name)) {
      continue;
    }
    const std::string source = child.name.substr(0, child.name.size() - std::strlen(kSourceSuffix));
    const torch::jit::Module own = child.value.attr(own_name).toModule();
    for (const auto& held : own.named_attributes(/*recurse=*/false)) {
      if (held.value.isTensor()) {
        sources[source][held.name] = held.value.toTensor().detach().clone();
      }
    }
  }
  return sources;
}

// Computes weights from their sources, in float32 or wider whatever the module's dtype.
void compute_weights(Adapter& adapter) {
  if (adapter.sources.empty()) {
    return;
  }
  const at::ScalarType dtype = adapter.sources.begin()->second.begin()->second.scalar_type();
  const Reparametrisation sources = converted(adapter.sources, c10::promoteTypes(dtype, at::kFloat));
  std::map<std::string, at::Tensor> ejected;  // by pool
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const PlannedModule& module = adapter.plan[m];
    ModuleWeights& weights = adapter.weights[m];
    if (has_phm_factors(module, sources)) {
      for (const auto& [name, weight] : phm_weights(module, sources)) {
        weights[name] = weight.to(dtype);
      }
      continue;
    }
    if (has_lora_factors(module, sources)) {
      for (const auto& [name, weight] : factored_weights(module, sources)) {
        weights[name] = weight.to(dtype);
      }
      continue;
    }
    if (has_reft_sources(module, sources)) {
      const auto& reft = std::get<PlannedReft>(module.method);
      weights["projection"] = reft_projection(reft, sources.at(reft_source(module))).to(dtype);
      continue;
    }
    const auto* prefix = std::get_if<PlannedPrefix>(&module.method);
    const auto mlp = prefix ? sources.find(prefix->pool) : sources.end();
    if (mlp == sources.end()) {
      continue;
    }
    at::Tensor& states = ejected[mlp->first];
    states = states.defined() ? states : eject(mlp->second, prefix->config.non_linearity).to(dtype);
    std::tie(weights["prefix_key"], weights["prefix_value"]) = prefix_of_layer(states, *prefix);
  }
}

}  // namespace

AdapterWeights read_row(const torch::jit::Module& adapters_module, size_t row, const Plan& plan) {
  return read_weights(adapters_module, {"", {}, plan}, row);
}

std::vector<AdapterConfig> read_configs(const torch::jit::Module& adapters_module) {
  std::vector<AdapterConfig> configs;
  for (const c10::IValue& json : adapters_module.attr("configs").toListRef()) {
    configs.push_back(config_from_json(json.toStringRef()));
    if (adapters_module.hasattr("gate_pooling") && has_gates(configs.back())) {  // files of 0.1.0 have one for all
      configs.back().gate_pooling = adapters_module.attr("gate_pooling").toStringRef();
    }
  }
  return configs;
}

std::vector<Adapter> read_adapters(const torch::jit::Module& adapters_module, const Structure& structure) {
  std::vector<Adapter> adapters;
  const auto names = adapters_module.attr("names").toListRef();
  const std::vector<AdapterConfig> configs = read_configs(adapters_module);
  const bool has_merged = adapters_module.hasattr("merged");  // files of 0.1.0 have no such list
  for (size_t a = 0; a < names.size(); ++a) {
    Adapter adapter{names[a].toStringRef(), configs[a]};
    adapter.plan = make_plan(structure, adapter.config);
    adapter.merged = has_merged && adapters_module.attr("merged").toBoolList()[a];
    adapter.trainable = adapters_module.hasattr("trainable") && adapters_module.attr("trainable").toBoolList()[a];
    adapter.sources = read_sources(adapters_module, adapter.name);
    split_by_tower(adapter.plan, structure, adapter.sources);
    adapter.weights = read_weights(adapters_module, adapter, a);
    compute_weights(adapter);
    share_vera_matrix(adapter.plan, adapter.weights);
    adapters.push_back(std::move(adapter));
  }
  return adapters;
}

}  // namespace torchgraft
