#include <torchgraft/config/named_configs.h>

#include <torchgraft/config/check_supported.h>
#include <torchgraft/config/closest_name.h>
#include <torchgraft/config/config_union.h>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <cctype>
#include <functional>
#include <map>
#include <set>

namespace torchgraft {

BnConfig seq_bn_config() {
  BnConfig config;
  config.original_ln_before = true;
  return config;
}

BnConfig double_seq_bn_config() {
  BnConfig config;
  config.mh_adapter = true;
  config.non_linearity = "swish";
  return config;
}

BnConfig par_bn_config() {
  BnConfig config;
  config.reduction_factor = 2.0;
  config.init_weights = "mam_adapter";
  config.is_parallel = true;
  config.scaling = 4.0;
  return config;
}

AdapterConfig mam_config() {
  PrefixTuningConfig prefix;
  prefix.bottleneck_size = 800;
  return config_union({prefix, par_bn_config()});
}

AdapterConfig unipelt_config() {
  PrefixTuningConfig prefix;
  prefix.prefix_length = 10;
  BnConfig bottleneck = seq_bn_config();
  LoRAConfig lora;
  lora.alpha = 2;
  prefix.use_gating = bottleneck.use_gating = lora.use_gating = true;
  return config_union({prefix, bottleneck, lora});
}

namespace {

BnConfig with_inverse(BnConfig config) {
  config.inv_adapter = "nice";
  config.inv_adapter_reduction_factor = 2.0;
  return config;
}

// Steitz & Roth 2024.
BnConfig adapter_plus() {
  BnConfig config = seq_bn_config();
  config.original_ln_after = false;
  config.residual_before_ln = false;
  config.stochastic_depth = 0.1;
  config.init_weights = "houlsby";
  config.scaling = std::string("channel");
  config.reduction_factor = 96.0;
  config.non_linearity = "gelu";
  return config;
}

BnConfig with_phm(BnConfig config) {
  config.phm_layer = true;
  config.reduction_factor = 32.0;
  config.non_linearity = "gelu";
  return config;
}

BnConfig with_learned_scaling(BnConfig config) {
  config.scaling = std::string("learned");
  return config;
}

PrefixTuningConfig flat_prefix() {
  PrefixTuningConfig config;
  config.flat = true;
  return config;
}

LoRAConfig ia3() {
  LoRAConfig config;
  config.intermediate_lora = true;
  config.r = 1;
  config.alpha = 1;
  config.attn_matrices = {"k", "v"};
  config.composition_mode = "scale";
  config.init_weights = "ia3";
  return config;
}

LoRAConfig vera() {
  LoRAConfig config;
  config.vera_d = 0.1;
  config.vera_b = 0.0;
  config.init_weights = "vera";
  return config;
}

LoRAConfig mtl_lora() {
  LoRAConfig config;
  config.mtl_lora = true;
  return config;
}

LoRAConfig with_dora(LoRAConfig config) {
  config.use_dora = true;
  return config;
}

AdapterConfig single(MethodConfig method) { return AdapterConfig{{std::move(method)}}; }

const std::map<std::string, std::function<AdapterConfig()>, std::less<>>& registry() {
  static const std::map<std::string, std::function<AdapterConfig()>, std::less<>> kRegistry = {
      // The library's own class names, present and older ones.
      {"PfeifferConfig", [] { return single(seq_bn_config()); }},
      {"HoulsbyConfig", [] { return single(double_seq_bn_config()); }},
      {"ParallelConfig", [] { return single(par_bn_config()); }},
      {"SeqBnConfig", [] { return single(seq_bn_config()); }},
      {"DoubleSeqBnConfig", [] { return single(double_seq_bn_config()); }},
      {"ParBnConfig", [] { return single(par_bn_config()); }},
      {"AdapterPlusConfig", [] { return single(adapter_plus()); }},
      {"PrefixTuningConfig", [] { return single(PrefixTuningConfig{}); }},
      {"PromptTuningConfig", [] { return single(PromptTuningConfig{}); }},
      {"LoRAConfig", [] { return single(LoRAConfig{}); }},
      {"LoReftConfig", [] { return single(loreft_config()); }},
      {"NoReftConfig", [] { return single(noreft_config()); }},
      {"DiReftConfig", [] { return single(direft_config()); }},
      {"MAMConfig", [] { return mam_config(); }},
      {"UniPELTConfig", [] { return unipelt_config(); }},
      {"pfeiffer", [] { return single(seq_bn_config()); }},
      {"houlsby", [] { return single(double_seq_bn_config()); }},
      {"parallel", [] { return single(par_bn_config()); }},
      {"scaled_parallel", [] { return single(with_learned_scaling(par_bn_config())); }},
      {"pfeiffer+inv", [] { return single(with_inverse(seq_bn_config())); }},
      {"houlsby+inv", [] { return single(with_inverse(double_seq_bn_config())); }},
      {"seq_bn", [] { return single(seq_bn_config()); }},
      {"double_seq_bn", [] { return single(double_seq_bn_config()); }},
      {"par_bn", [] { return single(par_bn_config()); }},
      {"scaled_par_bn", [] { return single(with_learned_scaling(par_bn_config())); }},
      {"seq_bn_inv", [] { return single(with_inverse(seq_bn_config())); }},
      {"double_seq_bn_inv", [] { return single(with_inverse(double_seq_bn_config())); }},
      {"compacter++", [] { return single(with_phm(seq_bn_config())); }},
      {"compacter", [] { return single(with_phm(double_seq_bn_config())); }},
      {"prefix_tuning", [] { return single(PrefixTuningConfig{}); }},
      {"prefix_tuning_flat", [] { return single(flat_prefix()); }},
      {"prompt_tuning", [] { return single(PromptTuningConfig{}); }},
      {"lora", [] { return single(LoRAConfig{}); }},
      {"ia3", [] { return single(ia3()); }},
      {"vera", [] { return single(vera()); }},
      {"dora", [] { return single(with_dora(LoRAConfig{})); }},
      {"dvora", [] { return single(with_dora(vera())); }},
      {"mtl_lora", [] { return single(mtl_lora()); }},
      {"loreft", [] { return single(loreft_config()); }},
      {"noreft", [] { return single(noreft_config()); }},
      {"direft", [] { return single(direft_config()); }},
      {"mam", [] { return mam_config(); }},
      {"unipelt", [] { return unipelt_config(); }},
  };
  return kRegistry;
}

// Class names are understood only.
bool is_advertised(const std::string& name) { return std::islower(static_cast<unsigned char>(name[0])); }

bool is_supported(const AdapterConfig& config) {
  try {
    check_supported(config);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

}  // namespace

std::vector<std::string> config_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : registry()) {
    if (is_advertised(name)) {
      names.push_back(name);
    }
  }
  return names;
}

AdapterConfig config_from_name(std::string_view name) {
  const std::string plain = plain_name(name);
  std::vector<std::string> names;
  for (const auto& [known, make] : registry()) {
    // Names that differ in how they are written alone are of one configuration.
    if (known == name || (!plain.empty() && plain_name(known) == plain)) {
      return make();
    }
    if (is_advertised(known) && is_supported(make())) {
      names.push_back(known);
    }
  }
  const std::string all = c10::Join(", ", names);
  TORCH_CHECK(false, "config: no configuration is called '", name, "'; there are: ", all, did_you_mean(name, names));
}

}  // namespace torchgraft
