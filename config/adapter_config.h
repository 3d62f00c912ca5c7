#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace torchgraft {

// Fields and defaults are those of adapters==1.3.0 (tests compare them one by one with the live library).

// Bottleneck adapters. reduction_factor: one number, or a map from layer number (or "default") to a number.
struct BnConfig {
  bool mh_adapter = false;
  bool output_adapter = true;
  std::variant<double, std::map<std::string, double>> reduction_factor = 16.0;
  std::string non_linearity = "relu";
  bool original_ln_before = false;
  bool original_ln_after = true;
  bool ln_before = false;
  bool ln_after = false;
  std::string init_weights = "bert";
  std::optional<int64_t> init_weights_seed;
  bool is_parallel = false;
  std::variant<double, std::string> scaling = 1.0;  // a number, "learned" or "channel"
  bool use_gating = false;
  std::variant<bool, std::string> residual_before_ln = true;  // or "post_add"
  bool adapter_residual_before_ln = false;
  std::optional<std::string> inv_adapter;
  std::optional<double> inv_adapter_reduction_factor;
  bool cross_adapter = false;
  std::vector<int64_t> leave_out;
  double dropout = 0.0;
  bool phm_layer = false;
  int64_t phm_dim = 4;
  bool factorized_phm_W = true;
  bool shared_W_phm = false;
  bool shared_phm_rule = true;
  bool factorized_phm_rule = false;
  std::string phm_c_init = "normal";
  double phm_init_range = 0.0001;
  bool learn_phm = true;
  std::string hypercomplex_nonlinearity = "glorot-uniform";
  int64_t phm_rank = 1;
  bool phm_bias = true;
  double stochastic_depth = 0.0;
};

struct PrefixTuningConfig {
  bool encoder_prefix = true;
  bool cross_prefix = true;
  std::vector<int64_t> leave_out;
  bool flat = false;
  int64_t prefix_length = 30;
  int64_t bottleneck_size = 512;
  std::string non_linearity = "tanh";
  double dropout = 0.0;
  bool use_gating = false;
  bool shared_gating = true;
  std::optional<int64_t> init_weights_seed;
};

struct LoRAConfig {
  bool selfattn_lora = true;
  bool intermediate_lora = false;
  bool output_lora = false;
  std::vector<int64_t> leave_out;
  int64_t r = 8;
  double alpha = 8;
  double dropout = 0.0;
  std::vector<std::string> attn_matrices = {"q", "v"};
  std::string composition_mode = "add";
  std::string init_weights = "lora";
  std::optional<int64_t> init_weights_seed;
  bool use_gating = false;
  bool use_dora = false;
  std::optional<double> vera_d;
  std::optional<double> vera_b;
  std::optional<std::string> dtype;
};

using MethodConfig = std::variant<BnConfig, PrefixTuningConfig, LoRAConfig>;

// All methods under one adapter name; a single method is a union of one.
struct AdapterConfig {
  std::vector<MethodConfig> methods;
};

// The named constructors of the oracle.
TORCHGRAFT_PATCH_API BnConfig seq_bn_config();
TORCHGRAFT_PATCH_API BnConfig double_seq_bn_config();
TORCHGRAFT_PATCH_API BnConfig par_bn_config();
TORCHGRAFT_PATCH_API AdapterConfig config_union(std::vector<MethodConfig> methods);  // validates as ConfigUnion does
TORCHGRAFT_PATCH_API AdapterConfig mam_config();
TORCHGRAFT_PATCH_API AdapterConfig unipelt_config();

// The names that `config_from_name` knows, sorted.
TORCHGRAFT_PATCH_API std::vector<std::string> config_names();

// "unipelt", "mam", "seq_bn", "pfeiffer", ... Throws c10::Error that lists the names.
TORCHGRAFT_PATCH_API AdapterConfig config_from_name(std::string_view name);

// A name with other values, or a union of such, as the oracle's configuration strings:
// "seq_bn[reduction_factor=8]|lora[r=16, use_gating=True]". Values are Python literals; of a union that has a name
// ("mam[...]") every part gets them. Throws c10::Error that says what cannot be read.
TORCHGRAFT_PATCH_API AdapterConfig config_from_string(std::string_view text);

// The text of an AdapterHub adapter_config.json (with its outer {"config": ...}) or of the inner config alone. An
// unknown field, a wrong type or malformed JSON throws c10::Error that names it.
TORCHGRAFT_PATCH_API AdapterConfig config_from_json(std::string_view json);

// The inner config, every field written, as AdapterConfig.to_dict() of the oracle: {"architecture": "union", ...} for
// more than one method.
TORCHGRAFT_PATCH_API std::string config_to_json(const AdapterConfig& config);

// Throws c10::Error naming the first field whose value this version does not support, and what it would accept.
TORCHGRAFT_PATCH_API void check_supported(const AdapterConfig& config);

}  // namespace torchgraft
