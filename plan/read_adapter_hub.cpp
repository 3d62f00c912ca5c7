#include <torchgraft/plan/read_adapter_hub.h>

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/checkpoint_part.h>
#include <torchgraft/plan/invertible.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/match_modules.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/prefix_mlp.h>
#include <torchgraft/plan/reft_weights.h>
#include <torchgraft/plan/reparametrisation.h>

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <map>
#include <set>
#include <tuple>

namespace torchgraft {
namespace {

// Reads the weights of a plan from a checkpoint, and remembers which keys it has read.
class WeightReader {
 public:
  WeightReader(int64_t hidden_size, const Checkpoint& checkpoint, const at::TensorOptions& options)
      : hidden_size_(hidden_size), checkpoint_(checkpoint), options_(options) {}

  ModuleWeights read(const PlannedModule& module, const SavedParameters& saved);
  void check_nothing_is_left() const;
  // What the weights read so far are computed from, in the model's dtype.
  Reparametrisation sources() const { return converted(sources_, options_); }

 private:
  at::Tensor take(const SavedParameters& saved, const std::string& name, at::IntArrayRef shape,
                  const std::string& place);
  void read_gate(const SavedParameters& saved, int64_t gates, int64_t features, const std::string& place,
                 ModuleWeights& weights);
  ModuleWeights read_lora(const PlannedModule& module, const SavedParameters& saved, const std::string& place);
  void read_lora_factors(const PlannedModule& module, const SavedParameters& saved, const std::string& place,
                         ModuleWeights& weights);
  ModuleWeights read_bottleneck(const PlannedModule& module, const SavedParameters& saved, const std::string& place);
  void read_phm(const PlannedModule& module, const PhmShape& shape, const SavedParameters& saved,
                const std::string& place, ModuleWeights& weights);
  const SavedParameters& pool_of(const PlannedPrefix& prefix, const std::string& location) const;
  at::Tensor ejected(const PlannedPrefix& prefix, const std::string& location);

  int64_t hidden_size_;
  const Checkpoint& checkpoint_;
  at::TensorOptions options_;
  std::map<std::string, at::Tensor> groups_;  // ejected prefixes by pool
  Reparametrisation sources_;
  std::set<std::string> used_;  // keys
};

at::Tensor WeightReader::take(const SavedParameters& saved, const std::string& name, at::IntArrayRef shape,
                              const std::string& place) {
  const auto found = saved.find(name);
  TORCH_CHECK(found != saved.end(), "adapter weights: ", name, " of ", place, " is missing in the checkpoint");
  const at::Tensor& tensor = found->second.tensor;
  if (tensor.sizes() != shape) {
    const int64_t saved_hidden = tensor.dim() > 0 ? tensor.sizes().back() : 0;
    const bool other_hidden =
        tensor.dim() == 2 && !shape.empty() && shape.back() == hidden_size_ && saved_hidden != hidden_size_;
    TORCH_CHECK(false, "adapter weights: expected ", found->second.key, " of shape ", shape, ", got ", tensor.sizes(),
                other_hidden ? c10::str("; this adapter was trained for hidden size ", saved_hidden, ", the model has ",
                                        hidden_size_)
                             : std::string());
  }
  TORCH_CHECK(tensor.is_floating_point(), "adapter weights: expected ", found->second.key,
              " to be of a floating-point type, got ", tensor.scalar_type());
  used_.insert(found->second.key);
  return tensor.detach();
}

void WeightReader::read_gate(const SavedParameters& saved, int64_t gates, int64_t features, const std::string& place,
                             ModuleWeights& weights) {
  weights["gate_weight"] = take(saved, "gate_weight", {gates, features}, place);
  weights["gate_bias"] = take(saved, "gate_bias", {gates}, place);
}

// Computes in float32 or wider, whatever the model's dtype.
void WeightReader::read_lora_factors(const PlannedModule& module, const SavedParameters& saved,
                                     const std::string& place, ModuleWeights& weights) {
  const auto dtype = c10::promoteTypes(c10::typeMetaToScalarType(options_.dtype()), at::kFloat);
  const auto wide = [&](const SavedParameters& from, const std::string& name, at::IntArrayRef shape) {
    return take(from, name, shape, place).to(options_.dtype(dtype));
  };
  ModuleWeights& own = sources_[lora_factors_key(module)];
  if (lora_factors(module) == LoRAFactors::kVera) {
    const auto& [config, in, out] = std::get<PlannedLoRA>(module.method);
    ModuleWeights& shared = sources_[kSharedVera];
    for (const auto& [name, shape] :
         {std::pair("lora_A", std::vector{config.r, in}), std::pair("lora_B", std::vector{out, config.r})}) {
      TORCH_CHECK(checkpoint_.shared.count(name), "adapter weights: ", name,
                  " of VeRA, which all modules of the adapter share, is missing in the checkpoint: the library leaves "
                  "it out when it saves from a model without a head around it; save from one with a head");
      if (!shared.count(name)) {
        shared[name] = wide(checkpoint_.shared, name, shape);
      }
    }
  }
  for (const auto& [name, shape] : own_factor_shapes(module)) {
    own[name] = wide(saved, name == "task_b" ? "lora_b" : name, shape);
  }
  for (const auto& [name, weight] : factored_weights(module, sources_)) {
    weights[name] = weight;
  }
}

ModuleWeights WeightReader::read_lora(const PlannedModule& module, const SavedParameters& saved,
                                      const std::string& place) {
  const auto& planned = std::get<PlannedLoRA>(module.method);
  const LoRAConfig& config = planned.config;
  ModuleWeights weights;
  const LoRAForm form = lora_form(config);
  const LoRAFactors factors = lora_factors(config);
  if (factors != LoRAFactors::kNone) {
    read_lora_factors(module, saved, place, weights);
  }
  if (form != LoRAForm::kScale && factors != LoRAFactors::kVera) {
    weights["lora_a"] = take(saved, "lora_a", {config.r, planned.in_features}, place);
  }
  if (form == LoRAForm::kDora) {
    weights["magnitude"] = take(saved, "magnitude", {planned.out_features, 1}, place).squeeze(-1);
    weights["fixed"] = saved.count("fixed") ? take(saved, "fixed", {planned.out_features}, place)
                                            : at::zeros({planned.out_features}, at::kDouble);
  }
  if (factors == LoRAFactors::kNone) {
    weights["lora_b"] = take(saved, "lora_b", {planned.out_features, config.r}, place);
  }
  if (config.lora_bias) {
    weights["bias"] = take(saved, "bias", {planned.out_features}, place);
  }
  weights["scaling"] = at::scalar_tensor(lora_scaling(config), at::kDouble);
  if (config.use_gating) {
    read_gate(saved, 1, planned.in_features, place, weights);
  }
  return weights;
}

ModuleWeights WeightReader::read_bottleneck(const PlannedModule& module, const SavedParameters& saved,
                                            const std::string& place) {
  const auto& planned = std::get<PlannedBottleneck>(module.method);
  const int64_t hidden = planned.hidden_size;
  const int64_t size = planned.bottleneck_size;
  ModuleWeights weights;
  if (planned.config.phm_layer) {
    read_phm(module, {hidden, size, "down"}, saved, place, weights);
    read_phm(module, {size, hidden, "up"}, saved, place, weights);
  } else {
    weights["down_weight"] = take(saved, "down_weight", {size, hidden}, place);
    weights["down_bias"] = take(saved, "down_bias", {size}, place);
    weights["up_weight"] = take(saved, "up_weight", {hidden, size}, place);
    weights["up_bias"] = take(saved, "up_bias", {hidden}, place);
  }
  for (const std::string& norm : own_norms(planned.config)) {
    for (const std::string& name : {norm + "_weight", norm + "_bias"}) {
      weights[name] = take(saved, name, {hidden}, place);
    }
  }
  if (const auto* number = std::get_if<double>(&planned.config.scaling)) {
    weights["scaling"] = at::full({1}, *number, at::kDouble);
  } else {
    const bool per_channel = std::get<std::string>(planned.config.scaling) == "channel";
    weights["scaling"] = take(saved, "scaling", {per_channel ? hidden : 1}, place);
  }
  if (planned.config.use_gating) {
    read_gate(saved, 1, hidden, place, weights);
  }
  return weights;
}

// Computes in float32 or wider, whatever the model's dtype.
void WeightReader::read_phm(const PlannedModule& module, const PhmShape& shape, const SavedParameters& saved,
                            const std::string& place, ModuleWeights& weights) {
  const BnConfig& config = std::get<PlannedBottleneck>(module.method).config;
  const auto dtype = c10::promoteTypes(c10::typeMetaToScalarType(options_.dtype()), at::kFloat);
  const std::string side = shape.side;
  weights[side + "_weight"] =
      phm_weight(config, shape, [&](const std::string& name, at::IntArrayRef sizes, bool shared) {
        const PhmSource kept = phm_place(module, side, name, shared);
        TORCH_CHECK(
            !shared || checkpoint_.shared.count(kept.name), "adapter weights: ", kept.name,
            ", which all modules of the adapter share, is missing in the checkpoint: the library leaves it out when it "
            "saves from a model without a head around it; save from one with a head");
        at::Tensor& factor = sources_[kept.source][kept.name];
        factor = take(shared ? checkpoint_.shared : saved, kept.name, sizes, place).to(options_.dtype(dtype));
        return factor;
      });
  weights[side + "_bias"] = config.phm_bias ? take(saved, side + "_bias", {shape.out}, place) : at::zeros({shape.out});
}

// The part of the prefix pool for `location`. Some models prefix the location with their own name; DistilBERT calls it
// "self".
const SavedParameters& WeightReader::pool_of(const PlannedPrefix& prefix, const std::string& location) const {
  if (prefix.pool != location) {
    const auto found = checkpoint_.prefixes.find(prefix.pool);
    TORCH_CHECK(found != checkpoint_.prefixes.end(), "adapter weights: the prefixes of ", prefix.pool,
                " are missing in the checkpoint: those of a whole CLIP have two parts, one for each tower");
    return found->second;
  }
  const std::string ending = "_" + location;
  for (const auto& [saved_location, parameters] : checkpoint_.prefixes) {
    const bool is_short = saved_location + "_prefix" == location;
    if (saved_location == location || is_short || saved_location.ends_with(ending)) {
      return parameters;
    }
  }
  // Attention of an encoder without a decoder: "self" to us, "encoder" in some of the library's models.
  if (checkpoint_.prefixes.size() == 1 && location != "cross_prefix") {
    return checkpoint_.prefixes.begin()->second;
  }
  TORCH_CHECK(false, "adapter weights: the prefixes of ", location, " are missing in the checkpoint");
}

// [P, L 2 h d] of the group at `location`, computed in float32 or wider, whatever the model's dtype.
at::Tensor WeightReader::ejected(const PlannedPrefix& prefix, const std::string& location) {
  if (const auto known = groups_.find(prefix.pool); known != groups_.end()) {
    return known->second;
  }
  const SavedParameters& saved = pool_of(prefix, location);
  const auto dtype = c10::promoteTypes(c10::typeMetaToScalarType(options_.dtype()), at::kFloat);
  const auto wide = [&](const std::string& name, at::IntArrayRef shape) {
    return take(saved, name, shape, prefix.pool).to(options_.dtype(dtype));
  };
  const int64_t length = prefix.config.prefix_length;
  const int64_t out = prefix.group_size * 2 * prefix.num_kv_heads * prefix.head_dim;
  at::Tensor result;
  if (prefix.config.flat) {
    result = wide("flat", {length * out}).view({length, out});
  } else {
    const int64_t middle = prefix.config.bottleneck_size;
    ModuleWeights& mlp = sources_[prefix.pool];
    mlp["embeddings"] = wide("embeddings", {length, prefix.hidden_size});
    mlp["down_weight"] = wide("down_weight", {middle, prefix.hidden_size});
    mlp["down_bias"] = wide("down_bias", {middle});
    mlp["up_weight"] = wide("up_weight", {out, middle});
    mlp["up_bias"] = wide("up_bias", {out});
    result = eject(mlp, prefix.config.non_linearity);
  }
  groups_[prefix.pool] = result;
  return result;
}

ModuleWeights WeightReader::read(const PlannedModule& module, const SavedParameters& saved) {
  const std::string place = module.site + " of layer " + std::to_string(module.number);
  ModuleWeights weights;
  if (std::holds_alternative<PlannedLoRA>(module.method)) {
    weights = read_lora(module, saved, place);
  } else if (std::holds_alternative<PlannedBottleneck>(module.method)) {
    weights = read_bottleneck(module, saved, place);
  } else if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
    for (const auto& [name, shape] : invertible_shapes(*invertible)) {
      weights[name] = take(checkpoint_.invertible, invertible_names().at(name), shape, place);
    }
  } else if (const auto* prompt = std::get_if<PlannedPrompt>(&module.method)) {
    weights["prompt"] =
        take(checkpoint_.prompt, kSavedPrompt, {prompt->config.prompt_length, prompt->embedding_size}, place);
  } else if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
    const TakeTensor take_tensor = [&](const std::string& name, at::IntArrayRef shape) {
      return take(saved, name, shape, place);
    };
    weights = read_reft(*reft, take_tensor, sources_[reft_source(module)]);
  } else {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    std::tie(weights["prefix_key"], weights["prefix_value"]) =
        prefix_of_layer(ejected(prefix, module.location), prefix);
    if (prefix.config.use_gating) {
      read_gate(saved, prefix.config.shared_gating ? 1 : 2, prefix.hidden_size, place, weights);
    }
  }
  convert(weights, options_);
  return weights;
}

void WeightReader::check_nothing_is_left() const {
  const auto check = [&](const SavedParameters& parameters) {
    for (const auto& [name, saved] : parameters) {
      TORCH_CHECK(used_.count(saved.key), "adapter weights: the checkpoint has ", saved.key,
                  ", for which the config has no location");
    }
  };
  for (const SavedModule& module : checkpoint_.modules) {
    check(module.parameters);
  }
  for (const auto& [location, parameters] : checkpoint_.prefixes) {
    check(parameters);
  }
  check(checkpoint_.invertible);
  check(checkpoint_.prompt);
  check(checkpoint_.shared);
}

// Whether the checkpoint has weights for this module alone. Prefixes, prompts and invertible adapters have theirs
// elsewhere, and Compacters may share all of them.
bool has_own_weights(const PlannedModule& module) {
  const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
  return !std::holds_alternative<PlannedPrefix>(module.method) &&
         !std::holds_alternative<PlannedInvertible>(module.method) &&
         !std::holds_alternative<PlannedPrompt>(module.method) &&
         !(bottleneck && (bottleneck->config.shared_W_phm || bottleneck->config.shared_phm_rule));
}

// A checkpoint without any weight for some layers was trained on a model of fewer layers, or left these out.
void check_layers(const Plan& plan, const std::vector<SavedParameters>& matched) {
  std::map<int64_t, bool> has_weights;  // by layer
  for (size_t i = 0; i < plan.size(); ++i) {
    if (has_own_weights(plan[i])) {
      has_weights[plan[i].number] |= !matched[i].empty();
    }
  }
  std::vector<int64_t> without;
  for (const auto& [layer, has_some] : has_weights) {
    if (!has_some) {
      without.push_back(layer);
    }
  }
  TORCH_CHECK(without.empty() || without.size() == has_weights.size(),
              "adapter weights: the checkpoint has nothing for ", without.size() == 1 ? "layer " : "layers ",
              c10::Join(", ", without), " of the ", has_weights.size(),
              " that the configuration is for: is the adapter of a model of fewer layers? If it was trained without ",
              without.size() == 1 ? "it" : "them", ", \"leave_out\" in its adapter_config.json says so");
}

}  // namespace

AdapterWeights adapter_hub_weights(const Plan& plan, const Structure& structure, const StateDict& state,
                                   const std::string& saved_name, const at::TensorOptions& options,
                                   Reparametrisation* kept) {
  TORCH_CHECK(!structure.layers.empty(), "adapter weights: the model has no attention layer");
  Checkpoint checkpoint = sort_checkpoint(state, saved_name);
  keep_part_of_model(checkpoint, plan, structure);
  const std::vector<SavedParameters> matched = match_modules(checkpoint, plan, structure);
  check_layers(plan, matched);
  WeightReader reader(structure.layers.front().hidden_size, checkpoint, options);
  AdapterWeights result;
  for (size_t i = 0; i < plan.size(); ++i) {
    result.push_back(reader.read(plan[i], matched[i]));
  }
  reader.check_nothing_is_left();
  share_vera_matrix(plan, result);
  if (kept) {
    *kept = reader.sources();
  }
  return result;
}

std::vector<WeightMatch> adapter_hub_matches(const Plan& plan, const Structure& structure, const StateDict& state,
                                             const std::string& saved_name) {
  Checkpoint checkpoint = sort_checkpoint(state, saved_name);
  keep_part_of_model(checkpoint, plan, structure);
  const std::vector<SavedParameters> matched = match_modules(checkpoint, plan, structure);
  std::vector<WeightMatch> result;
  for (size_t i = 0; i < plan.size(); ++i) {
    for (const auto& [name, saved] : matched[i]) {
      result.push_back({saved.key, c10::str("layer ", plan[i].number, ", ", plan[i].site, ": ", name)});
    }
  }
  for (const auto& [location, parameters] : checkpoint.prefixes) {
    for (const auto& [name, saved] : parameters) {
      result.push_back({saved.key, c10::str("the prefixes of ", location, ": ", name)});
    }
  }
  for (const auto& [name, saved] : checkpoint.invertible) {
    result.push_back({saved.key, "the embeddings, inv_adapter: " + name});
  }
  for (const auto& [name, saved] : checkpoint.prompt) {
    result.push_back({saved.key, "the embeddings, prompt_tuning: " + name});
  }
  for (const auto& [name, saved] : checkpoint.shared) {
    result.push_back({saved.key, c10::str("all modules: ", name)});
  }
  return result;
}

}  // namespace torchgraft
