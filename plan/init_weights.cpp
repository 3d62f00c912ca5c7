#include <torchgraft/plan/init_weights.h>

#include <torchgraft/plan/draws.h>
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

at::Tensor normal(at::IntArrayRef shape, double std) { return at::empty(shape).normal_(0.0, std); }

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
  const auto draw = [&](at::IntArrayRef sizes) {
    return is_normal ? normal(sizes, spread) : uniform_within(sizes, spread);
  };
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

// New linear maps, whose weights the library draws a second time, without a seed of their own.
ModuleWeights init_invertible(const PlannedInvertible& planned) {
  const auto shapes = invertible_shapes(planned);
  ModuleWeights weights;
  for (const char* name : {"f_down", "f_up", "g_down", "g_up"}) {
    const auto& shape = shapes.at(std::string(name) + "_weight");
    linear_weight(shape[0], shape[1]);
    linear_bias(shape[0], shape[1]);
    weights[std::string(name) + "_bias"] = at::zeros(shapes.at(std::string(name) + "_bias"));
  }
  for (const char* name : {"f_down_weight", "f_up_weight", "g_down_weight", "g_up_weight"}) {
    weights[name] = normal(shapes.at(name), kBertStd);
  }
  return weights;
}

// A new torch.nn.Embedding, whose weight the library draws a second time.
at::Tensor init_prompt(const PlannedPrompt& planned) {
  const PromptTuningConfig& config = planned.config;
  TORCH_CHECK(config.prompt_init != "from_string",
              "graft: prompt_init=\"from_string\" needs the tokenizer of the model, which a graph has not got; graft "
              "with prompt_init=\"random_uniform\", or add the adapter by the adapters library and load its directory");
  const std::vector<int64_t> shape = {config.prompt_length, planned.embedding_size};
  normal(shape, 1.0);
  fix_seed(config.init_weights_seed);
  return at::empty(shape).uniform_(-config.random_uniform_scale, config.random_uniform_scale);
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

// The plan's modules in the order in which their weights are drawn: layer by layer, prefixes first, and invertible
// adapters behind all layers, as in the library. They have no seed of their own: what is drawn before them decides. So
// the library's order within a layer counts too, and prefixes come behind the layers where there is one.
std::vector<size_t> drawing_order(const Plan& plan) {
  const auto is_inverse = [](const PlannedModule& module) {
    return std::holds_alternative<PlannedInvertible>(module.method);
  };
  const bool has_inverse = std::any_of(plan.begin(), plan.end(), is_inverse);
  std::vector<size_t> order(plan.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto rank = [&](size_t i) {
    const bool is_prefix = std::holds_alternative<PlannedPrefix>(plan[i].method);
    const bool is_prompt = std::holds_alternative<PlannedPrompt>(plan[i].method);
    const int behind_layers = is_inverse(plan[i]) ? 2 : is_prompt || (is_prefix && has_inverse) ? 1 : 0;
    const int in_layer = is_prompt                       ? -1
                         : is_prefix                     ? 0
                         : plan[i].site == "output_lora" ? 2
                         : plan[i].site == "output_reft" ? 3
                                                         : 1;
    return std::tuple(behind_layers, plan[i].layer, in_layer);
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rank(a) < rank(b); });
  return order;
}

class WeightsDrawer {
 public:
  explicit WeightsDrawer(const Plan& plan) : plan_(plan), result_(plan.size()) {}

  AdapterWeights draw(const at::TensorOptions& options, Reparametrisation* kept) {
    std::vector<size_t> order = drawing_order(plan_);
    const auto behind_layers = std::find_if(order.begin(), order.end(), [&](size_t i) { return is_invertible(i); });
    std::for_each(order.begin(), behind_layers, [&](size_t i) { draw_module(i); });
    std::for_each(order.begin(), behind_layers, [&](size_t i) {  // VeRA's matrices come behind all layers
      if (lora_factors(plan_[i]) == LoRAFactors::kVera) {
        init_lora_factors(plan_[i], result_[i], sources_);
      }
    });
    std::for_each(behind_layers, order.end(), [&](size_t i) { draw_module(i); });
    for (ModuleWeights& weights : result_) {
      convert(weights, options);
    }
    share_vera_matrix(plan_, result_);
    if (kept) {
      *kept = converted(std::move(sources_), options);
    }
    return std::move(result_);
  }

 private:
  bool is_invertible(size_t index) const { return std::holds_alternative<PlannedInvertible>(plan_[index].method); }

  void draw_module(size_t index) {
    const PlannedModule& module = plan_[index];
    ModuleWeights& weights = result_[index];
    if (const auto* lora = std::get_if<PlannedLoRA>(&module.method)) {
      weights = init(*lora);
      if (lora->config.lora_bias) {
        weights["bias"] = at::zeros({lora->out_features});
      }
      if (lora_factors(module) == LoRAFactors::kMtlLora) {
        init_lora_factors(module, weights, sources_);
      }
    } else if (std::holds_alternative<PlannedBottleneck>(module.method)) {
      weights = init_bottleneck(module, shared_, sources_);
    } else if (const auto* invertible = std::get_if<PlannedInvertible>(&module.method)) {
      weights = init_invertible(*invertible);
    } else if (const auto* prompt = std::get_if<PlannedPrompt>(&module.method)) {
      weights["prompt"] = init_prompt(*prompt);
    } else if (const auto* reft = std::get_if<PlannedReft>(&module.method)) {
      weights = init_reft(*reft, sources_[reft_source(module)]);
    } else {
      draw_prefix(module, weights);
    }
  }

  void draw_prefix(const PlannedModule& module, ModuleWeights& weights) {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    if (prefix.group_index == 0) {
      groups_[prefix.pool] = init_group(prefix, sources_[prefix.pool]);
    }
    std::tie(weights["prefix_key"], weights["prefix_value"]) = prefix_of_layer(groups_.at(prefix.pool), prefix);
    if (prefix.config.use_gating) {
      add_gate(weights, prefix.config.shared_gating ? 1 : 2, prefix.hidden_size);
    }
  }

  const Plan& plan_;
  AdapterWeights result_;
  Reparametrisation sources_;
  std::map<std::string, at::Tensor> groups_;  // pool -> the group's prefixes
  SharedFactors shared_;
};

}  // namespace

AdapterWeights init_weights(const Plan& plan, const at::TensorOptions& options, Reparametrisation* kept) {
  at::NoGradGuard no_grad;
  return WeightsDrawer(plan).draw(options, kept);
}

}  // namespace torchgraft
