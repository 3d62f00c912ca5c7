#include <torchgraft/config/check_supported.h>

#include <torchgraft/activations/activation.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cmath>

namespace torchgraft {
namespace {

[[noreturn]] void refuse(const std::string& field, const std::string& value, const std::string& supported) {
  TORCH_CHECK(false, "config: ", field, "=", value, " is not supported yet (supported: ", supported, ")");
}

// Of dropping: it acts only on adapters that are trained.
void require_probability(const std::string& field, double value) {
  TORCH_CHECK(value >= 0.0 && value < 1.0, "config: expected ", field, " to be at least 0 and below 1, got ", value);
}

void require_one_of(const std::string& field, const std::string& value, const std::vector<std::string>& names) {
  if (std::find(names.begin(), names.end(), value) != names.end()) {
    return;
  }
  std::string supported;
  for (const std::string& name : names) {
    supported += (supported.empty() ? "" : ", ") + name;
  }
  refuse(field, value, supported);
}

void require_positive(const std::string& field, double value) {
  TORCH_CHECK(value > 0, "config: expected ", field, " to be positive, got ", value);
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

// Without original_ln_before there is no sum that "post_add" could name: the library crashes on the first forward pass.
void check_residual(const BnConfig& config) {
  const auto* name = std::get_if<std::string>(&config.residual_before_ln);
  if (!name) {
    return;
  }
  if (*name != "post_add") {
    refuse("BnConfig.residual_before_ln", *name, "post_add, True, False");
  }
  TORCH_CHECK(config.is_parallel || config.original_ln_before,
              "config: BnConfig.residual_before_ln=\"post_add\" needs original_ln_before=True: without it there is no "
              "sum of adapter input and residual");
}

void check_reduction_factor(const BnConfig& config) {
  const std::string field = "BnConfig.reduction_factor";
  if (const auto* factor = std::get_if<double>(&config.reduction_factor)) {
    require_positive(field, *factor);
    return;
  }
  for (const auto& [layer, factor] : std::get<std::map<std::string, double>>(config.reduction_factor)) {
    const bool is_number = !layer.empty() && layer.find_first_not_of("0123456789") == std::string::npos;
    TORCH_CHECK(is_number || layer == "default", "config: expected the keys of ", field,
                " to be layer numbers or \"default\", got \"", layer, "\"");
    require_positive(field + "." + layer, factor);
  }
}

void check_phm(const BnConfig& config) {
  require_positive("BnConfig.phm_dim", static_cast<double>(config.phm_dim));
  require_positive("BnConfig.phm_rank", static_cast<double>(config.phm_rank));
  require_one_of("BnConfig.phm_c_init", config.phm_c_init, {"normal", "uniform"});
  require_one_of("BnConfig.hypercomplex_nonlinearity", config.hypercomplex_nonlinearity,
                 {"phm", "glorot-normal", "glorot-uniform", "normal"});
  // The library looks for a weight that such a layer does not have.
  TORCH_CHECK(config.init_weights == "bert",
              "config: phm_layer (Compacter) needs BnConfig.init_weights=\"bert\", got \"", config.init_weights, "\"");
}

// The library's GLOW block splits and joins along the wrong dimension and gives a list: no model runs with it.
void check_invertible(const BnConfig& config) {
  if (!config.inv_adapter) {
    return;
  }
  require_one_of("BnConfig.inv_adapter", *config.inv_adapter, {"nice"});
  TORCH_CHECK(config.inv_adapter_reduction_factor,
              "config: BnConfig.inv_adapter=\"nice\" needs "
              "BnConfig.inv_adapter_reduction_factor, got None");
  require_positive("BnConfig.inv_adapter_reduction_factor", *config.inv_adapter_reduction_factor);
}

void check(const BnConfig& config) {
  TORCH_CHECK(
      config.mh_adapter || config.output_adapter || config.cross_adapter || config.inv_adapter,
      "config: BnConfig has none of mh_adapter, output_adapter, cross_adapter and inv_adapter: such an adapter would "
      "change nothing");
  check_reduction_factor(config);
  require_one_of("BnConfig.non_linearity", lower(config.non_linearity), non_linearity_names());
  require_one_of("BnConfig.init_weights", config.init_weights, {"bert", "mam_adapter", "houlsby"});
  if (const auto* scaling = std::get_if<std::string>(&config.scaling)) {
    require_one_of("BnConfig.scaling", *scaling, {"learned", "channel"});
  }
  check_residual(config);
  if (config.phm_layer) {
    check_phm(config);
  }
  check_invertible(config);
  require_probability("BnConfig.dropout", config.dropout);
  require_probability("BnConfig.stochastic_depth", config.stochastic_depth);
}

void check(const PrefixTuningConfig& config) {
  require_positive("PrefixTuningConfig.prefix_length", static_cast<double>(config.prefix_length));
  require_positive("PrefixTuningConfig.bottleneck_size", static_cast<double>(config.bottleneck_size));
  require_one_of("PrefixTuningConfig.non_linearity", lower(config.non_linearity), non_linearity_names());
  require_probability("PrefixTuningConfig.dropout", config.dropout);
}

// The library then makes neither VeRA nor an error that says why, or fails on the first forward pass.
void check_vera(const LoRAConfig& config) {
  if (!config.vera_d && !config.vera_b) {
    return;
  }
  TORCH_CHECK(config.vera_d && config.vera_b,
              "config: VeRA needs both LoRAConfig.vera_d and LoRAConfig.vera_b, got no ",
              config.vera_d ? "vera_b" : "vera_d");
  TORCH_CHECK(config.composition_mode == "add", "config: VeRA needs LoRAConfig.composition_mode=\"add\", got \"",
              config.composition_mode, "\"");
  TORCH_CHECK(!config.lora_bias, "config: VeRA has no LoRAConfig.lora_bias");
}

void check_mtl_lora(const LoRAConfig& config) {
  if (!config.mtl_lora) {
    return;
  }
  require_positive("MTLLoRAConfig.n_up_projection", static_cast<double>(config.n_up_projection));
  TORCH_CHECK(config.weights_sharpness != 0.0 && std::isfinite(config.weights_sharpness),
              "config: expected MTLLoRAConfig.weights_sharpness to be finite and not 0, got ",
              config.weights_sharpness);
  // The library's class for "linear" sets a parameter before it is a module, and so cannot be made.
  require_one_of("MTLLoRAConfig.task_specific_matrix_type", config.task_specific_matrix_type, {"singular_values"});
  TORCH_CHECK(config.composition_mode == "add", "config: MTL-LoRA needs composition_mode=\"add\", got \"",
              config.composition_mode, "\"");
  TORCH_CHECK(!config.use_dora && !config.vera_d && !config.vera_b && !config.lora_bias,
              "config: MTL-LoRA cannot be joined with use_dora, vera_d, vera_b or lora_bias: the library has no such "
              "method");
}

void check(const LoRAConfig& config) {
  require_positive("LoRAConfig.r", static_cast<double>(config.r));
  check_vera(config);
  check_mtl_lora(config);
  TORCH_CHECK(!config.lora_bias || (config.composition_mode == "add" && !config.use_dora),
              "config: LoRAConfig.lora_bias=True is not supported with composition_mode=\"scale\" or use_dora");
  for (const std::string& matrix : config.attn_matrices) {
    require_one_of("LoRAConfig.attn_matrices", matrix, {"q", "k", "v"});
  }
  require_one_of("LoRAConfig.composition_mode", config.composition_mode, {"add", "scale"});
  require_one_of("LoRAConfig.init_weights", config.init_weights, {"lora", "bert", "ia3", "vera"});
  if (config.dtype) {  // weights get the model's dtype: the library's forward pass fails when the two differ
    require_one_of("LoRAConfig.dtype", *config.dtype,
                   {"float32", "float", "float64", "double", "float16", "half", "bfloat16"});
  }
  require_probability("LoRAConfig.dropout", config.dropout);
  if (config.composition_mode == "scale") {
    TORCH_CHECK(config.r == 1, "config: composition_mode=\"scale\" ((IA)^3) needs LoRAConfig.r=1, got ", config.r);
    TORCH_CHECK(!config.use_dora, "config: composition_mode=\"scale\" ((IA)^3) and use_dora exclude each other");
    TORCH_CHECK(config.dropout == 0.0, "config: composition_mode=\"scale\" ((IA)^3) has no dropout, got ",
                config.dropout);
  }
}

void check(const ReftConfig& config) { check_reft(config); }

void check(const PromptTuningConfig& config) {
  constexpr int64_t kLongest = 1 << 20;  // far beyond any model
  TORCH_CHECK(config.prompt_length > 0 && config.prompt_length <= kLongest,
              "config: expected PromptTuningConfig.prompt_length to be from 1 to ", kLongest, ", got ",
              config.prompt_length);
  require_one_of("PromptTuningConfig.prompt_init", config.prompt_init, {"random_uniform", "from_string"});
  require_one_of("PromptTuningConfig.combine", config.combine, {"prefix", "prefix_after_bos"});
  TORCH_CHECK(config.random_uniform_scale >= 0.0 && std::isfinite(config.random_uniform_scale),
              "config: expected PromptTuningConfig.random_uniform_scale to be finite and not negative, got ",
              config.random_uniform_scale);
}

}  // namespace

void check_supported(const AdapterConfig& config) {
  TORCH_CHECK(!config.methods.empty(), "config: an adapter needs at least one method, got none");
  for (const MethodConfig& method : config.methods) {
    std::visit([](const auto& held) { check(held); }, method);
  }
}

}  // namespace torchgraft
