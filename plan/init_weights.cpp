#include <torchgraft/plan/init_weights.h>

#include <torchgraft/plan/invertible.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/prefix_mlp.h>
#include <torchgraft/plan/reft_weights.h>
#include <torchgraft/plan/reparametrisation.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <tuple>

namespace torchgraft {
namespace {

constexpr double kBertStd = 0.02;
constexpr double kHoulsbyStd = 1e-2;
constexpr double kPhmRuleSpread = 1e-2;

// Seeds as the adapters library's fix_seed does: every module that has a seed starts from it, and 0 counts as no seed.
// The draws below, and their order, are those of the adapters library's modules: a seeded module equals the adapters
// library's bit for bit.
void fix_seed(const std::optional<int64_t>& seed) {
  if (seed && *seed != 0) {
    at::manual_seed(static_cast<uint64_t>(*seed));
  }
}

at::Tensor normal(at::IntArrayRef shape, double std) { return at::empty(shape).normal_(0.0, std); }

at::Tensor uniform(at::IntArrayRef shape, double bound) { return at::empty(shape).uniform_(-bound, bound); }

// kaiming_uniform_ with leaky-ReLU slope a: bound = sqrt(6 / ((1 + a^2) fan_in)).
at::Tensor kaiming_uniform(at::IntArrayRef shape, double slope) {
  return uniform(shape, std::sqrt(6.0 / ((1.0 + slope * slope) * static_cast<double>(shape[1]))));
}

// torch.nn.Linear's defaults: kaiming_uniform(a = sqrt(5)) and a bias within 1 / sqrt(fan_in).
at::Tensor linear_weight(int64_t out, int64_t in) { return kaiming_uniform({out, in}, std::sqrt(5.0)); }

at::Tensor linear_bias(int64_t out, int64_t in) { return uniform({out}, 1.0 / std::sqrt(static_cast<double>(in))); }

// trunc_normal_ within two standard deviations: draws values beyond them again.
at::Tensor truncated_normal(at::IntArrayRef shape) {
  at::Tensor values = normal(shape, kHoulsbyStd);
  while (true) {
    const at::Tensor beyond = values.abs() > 2 * kHoulsbyStd;
    if (!beyond.any().item<bool>()) {
      return values;
    }
    values = at::where(beyond, normal(shape, kHoulsbyStd), values);
  }
}

// A new torch.nn.Linear as a gate of `gates` outputs.
void add_default_gate(ModuleWeights& weights, int64_t gates, int64_t features) {
  weights["gate_weight"] = linear_weight(gates, features);
  weights["gate_bias"] = linear_bias(gates, features);
}

// The gate of a LoRA or a prefix: a new torch.nn.Linear, whose weight the adapters library draws a second time, but not
// its bias.
void add_gate(ModuleWeights& weights, int64_t gates, int64_t features) {
  add_default_gate(weights, gates, features);
  weights["gate_weight"] = normal({gates, features}, kBertStd);
}

// lora_a and lora_b.
ModuleWeights draw_matrices(const PlannedLoRA& planned) {
  const LoRAConfig& config = planned.config;
  const std::vector<int64_t> shape_a = {config.r, planned.in_features};
  const std::vector<int64_t> shape_b = {planned.out_features, config.r};
  ModuleWeights weights;
  fix_seed(config.init_weights_seed);
  if (config.init_weights == "lora") {
    weights = {{"lora_a", kaiming_uniform(shape_a, std::sqrt(5.0))}, {"lora_b", at::zeros(shape_b)}};
  } else if (config.init_weights == "bert") {
    weights = {{"lora_a", normal(shape_a, kBertStd)}, {"lora_b", normal(shape_b, kBertStd)}};
  } else if (config.init_weights == "ia3") {
    weights = {{"lora_a", at::ones(shape_a)}, {"lora_b", at::ones(shape_b)}};
  } else {
    TORCH_INTERNAL_ASSERT(config.init_weights == "vera", "unchecked init_weights ", config.init_weights);
    weights = {{"lora_a", kaiming_uniform(shape_a, 0.0)}, {"lora_b", kaiming_uniform(shape_b, 0.0)}};
  }
  return weights;
}

ModuleWeights init(const PlannedLoRA& planned) {
  const LoRAConfig& config = planned.config;
  ModuleWeights weights;
  if (lora_factors(config) == LoRAFactors::kVera) {
    fix_seed(config.init_weights_seed);  // the matrices come behind those of all modules: init_lora_factors
  } else {
    weights = draw_matrices(planned);
  }
  if (lora_form(config) == LoRAForm::kScale) {
    weights.erase("lora_a");
  } else if (lora_form(config) == LoRAForm::kDora) {
    linear_weight(planned.out_features, 1);                // the library draws a magnitude, and writes over it
    weights["fixed"] = at::zeros({planned.out_features});  // the magnitude is the base's: patch/adapters/dora.cpp
  }
  // The gate replaces alpha / r.
  weights["scaling"] = at::scalar_tensor(lora_scaling(config), at::kDouble);
  if (config.use_gating) {
    add_gate(weights, 1, planned.in_features);
  }
  return weights;
}

// The factors of one module, and VeRA's random matrices once for all of them.
void init_lora_factors(const PlannedModule& module, ModuleWeights& weights, Reparametrisation& sources) {
  const auto& lora = std::get<PlannedLoRA>(module.method);
  ModuleWeights& own = sources[lora_factors_key(module)];
  if (lora_factors(module) == LoRAFactors::kVera) {
    ModuleWeights& shared = sources[kSharedVera];
    if (shared.empty()) {
      ModuleWeights drawn = draw_matrices(lora);
      shared = {{"lora_A", drawn.at("lora_a")}, {"lora_B", drawn.at("lora_b")}};
    }
    own = {{"vera_d", at::diag(at::full({lora.config.r}, *lora.config.vera_d, at::kFloat))},
           {"vera_b", at::diag(at::full({lora.out_features}, *lora.config.vera_b, at::kFloat))}};
  } else {
    const auto shapes = own_factor_shapes(module);
    const at::IntArrayRef of_b = shapes.at("task_b");
    own = {{"task_b", lora.config.init_weights == "bert" ? normal(of_b, kBertStd) : at::zeros(of_b)},
           {"task_values", at::ones(shapes.at("task_values"))},
           {"task_weights", at::ones(shapes.at("task_weights"))}};
  }
  for (const auto& [name, weight] : factored_weights(module, sources)) {
    weights[name] = weight;
  }
}

at::Tensor bottleneck_scaling(const PlannedBottleneck& planned) {
  if (const auto* number = std::get_if<double>(&planned.config.scaling)) {
    return at::full({1}, *number, at::kDouble);
  }
  const bool per_channel = std::get<std::string>(planned.config.scaling) == "channel";
  return at::ones({per_channel ? planned.hidden_size : 1});
}

// The factors of Compacter's projections, by name.
using PhmDraws = std::map<std::string, at::Tensor>;

// xavier_normal_: the library ignores hypercomplex_nonlinearity, too.
at::Tensor xavier_normal(int64_t rows, int64_t columns) {
  return normal({rows, columns}, std::sqrt(2.0 / static_cast<double>(rows + columns)));
}

PhmDraws draw_blocks(const BnConfig& config, const PhmShape& shape) {
  const int64_t in = shape.in / config.phm_dim;
  const int64_t out = shape.out / config.phm_dim;
  std::vector<at::Tensor> first;
  std::vector<at::Tensor> second;
  for (int64_t i = 0; i < config.phm_dim; ++i) {
    first.push_back(xavier_normal(in, config.factorized_phm_W ? config.phm_rank : out));
    if (config.factorized_phm_W) {
      second.push_back(xavier_normal(config.phm_rank, out));
    }
  }
  if (!config.factorized_phm_W) {
    return {{"W", at::stack(first)}};
  }
  return {{"W_left", at::stack(first)}, {"W_right", at::stack(second)}};
}

// Rules that modules share have their own standard deviation.
PhmDraws draw_rules(const BnConfig& config) {
  const bool is_normal = config.phm_c_init == "normal";
  const double spread = !config.shared_phm_rule ? kPhmRuleSpread : is_normal ? config.phm_init_range : 1.0;
  const auto draw = [&](at::IntArrayRef sizes) { return is_normal ? normal(sizes, spread) : uniform(sizes, spread); };
  const int64_t n = config.phm_dim;
  if (!config.factorized_phm_rule) {
    return {{"phm_rule", draw({n, n, n})}};
  }
  PhmDraws result = {{"phm_rule_left", draw({n, n, 1})}};
  result["phm_rule_right"] = draw({n, 1, n});
  return result;
}

// What the modules of one adapter share: "down", "up" and "rule".
using SharedFactors = std::map<std::string, PhmDraws>;

at::Tensor init_phm(const PlannedModule& module, const PhmShape& shape, SharedFactors& all,
                    Reparametrisation& sources) {
  const BnConfig& config = std::get<PlannedBottleneck>(module.method).config;
  const auto drawn = [&](bool shared, const std::string& key, const auto& draw) {
    if (!shared) {
      return draw();
    }
    PhmDraws& draws = all[key];
    draws = draws.empty() ? draw() : draws;
    return draws;
  };
  fix_seed(config.init_weights_seed);
  PhmDraws factors = drawn(config.shared_W_phm, shape.side, [&] { return draw_blocks(config, shape); });
  factors.merge(drawn(config.shared_phm_rule, "rule", [&] { return draw_rules(config); }));
  return phm_weight(config, shape, [&](const std::string& name, at::IntArrayRef, bool is_shared) {
    const PhmSource place = phm_place(module, shape.side, name, is_shared);
    return sources[place.source][place.name] = factors.at(name);
  });
}

ModuleWeights init_bottleneck(const PlannedModule& module, SharedFactors& shared, Reparametrisation& sources) {
  const auto& planned = std::get<PlannedBottleneck>(module.method);
  const BnConfig& config = planned.config;
  const int64_t hidden = planned.hidden_size;
  const int64_t size = planned.bottleneck_size;
  ModuleWeights weights = {{"down_bias", at::zeros({size})}, {"up_bias", at::zeros({hidden})}};
  if (config.phm_layer) {
    weights["down_weight"] = init_phm(module, {hidden, size, "down"}, shared, sources);
    weights["up_weight"] = init_phm(module, {size, hidden, "up"}, shared, sources);
  }
  fix_seed(config.init_weights_seed);
  if (config.phm_layer) {
    // init_weights is for linear maps
  } else if (config.init_weights == "bert") {
    weights["down_weight"] = normal({size, hidden}, kBertStd);
    weights["up_weight"] = normal({hidden, size}, kBertStd);
  } else if (config.init_weights == "mam_adapter") {
    weights["down_weight"] = linear_weight(size, hidden);
    weights["up_weight"] = at::zeros({hidden, size});
  } else {
    TORCH_INTERNAL_ASSERT(config.init_weights == "houlsby", "unchecked init_weights ", config.init_weights);
    weights["down_weight"] = truncated_normal({size, hidden});
    weights["up_weight"] = truncated_normal({hidden, size});
  }
  weights["scaling"] = bottleneck_scaling(planned);
  for (const std::string& norm : own_norms(config)) {
    weights[norm + "_weight"] = at::ones({hidden});
    weights[norm + "_bias"] = at::zeros({hidden});
  }
  if (config.use_gating && config.init_weights == "houlsby") {
    add_default_gate(weights, 1, hidden);  // houlsby leaves the gate as it is
  } else if (config.use_gating) {
    weights["gate_weight"] = normal({1, hidden}, kBertStd);
    weights["gate_bias"] = at::zeros({1});
  }
  return weights;
}

ModuleWeights init_invertible(const PlannedInvertible& planned) {
  ModuleWeights weights;
  for (const auto& [name, shape] : invertible_shapes(planned)) {
    weights[name] = name.ends_with("_bias") ? at::zeros(shape) : normal(shape, kBertStd);
  }
  return weights;
}

// The prefixes of all layers of a group, [P, L 2 h d]; `mlp` gets the weights that they are computed from, unless they
// are flat.
at::Tensor init_group(const PlannedPrefix& planned, ModuleWeights& mlp) {
  const PrefixTuningConfig& config = planned.config;
  const int64_t out = planned.group_size * 2 * planned.num_kv_heads * planned.head_dim;
  fix_seed(config.init_weights_seed);
  if (config.flat) {
    return at::randn({config.prefix_length, out});
  }
  const int64_t hidden = planned.hidden_size;
  const int64_t middle = config.bottleneck_size;
  mlp["embeddings"] = at::randn({config.prefix_length, hidden});
  mlp["down_weight"] = linear_weight(middle, hidden);
  mlp["down_bias"] = linear_bias(middle, hidden);
  mlp["up_weight"] = linear_weight(out, middle);
  mlp["up_bias"] = linear_bias(out, middle);
  return eject(mlp, config.non_linearity);
}

// The plan's modules in the order in which their weights are drawn: layer by layer, prefixes first. A seed gives the
// weights that it gave before plans were in execution order.
std::vector<size_t> drawing_order(const Plan& plan) {
  std::vector<size_t> order(plan.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto rank = [&](size_t i) {
    return std::pair(plan[i].layer, !std::holds_alternative<PlannedPrefix>(plan[i].method));
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rank(a) < rank(b); });
  return order;
}

}  // namespace

AdapterWeights init_weights(const Plan& plan, const at::TensorOptions& options, Reparametrisation* kept) {
  at::NoGradGuard no_grad;
  Reparametrisation sources;
  std::map<std::string, at::Tensor> groups;  // prefix location -> the group's prefixes
  SharedFactors shared;
  AdapterWeights result(plan.size());
  for (const size_t index : drawing_order(plan)) {
    const PlannedModule& module = plan[index];
    ModuleWeights& weights = result[index];
    if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
      weights = init(*lora);
      if (lora->config.lora_bias) {
        weights["bias"] = at::zeros({lora->out_features});
      }
      if (lora_factors(module) != LoRAFactors::kNone) {
        init_lora_factors(module, weights, sources);
      }
    } else if (std::holds_alternative<PlannedBottleneck>(module.method)) {
      weights = init_bottleneck(module, shared, sources);
    } else if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
      weights = init_invertible(*invertible);
    } else if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
      weights = init_reft(*reft, sources[reft_source(module)]);
    } else {
      const auto& prefix = std::get<PlannedPrefix>(module.method);
      if (prefix.group_index == 0) {
        groups[module.location] = init_group(prefix, sources[module.location]);
      }
      std::tie(weights["prefix_key"], weights["prefix_value"]) = prefix_of_layer(groups.at(module.location), prefix);
      if (prefix.config.use_gating) {
        add_gate(weights, prefix.config.shared_gating ? 1 : 2, prefix.hidden_size);
      }
    }
    convert(weights, options);
  }
  share_vera_matrix(plan, result);
  if (kept) {
    *kept = converted(std::move(sources), options);
  }
  return result;
}

}  // namespace torchgraft
