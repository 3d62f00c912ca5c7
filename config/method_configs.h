#pragma once

#include <torchgraft/config/reft_config.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace torchgraft {

// PromptTuningConfig::random_uniform_scale of the library: fresh prompts are uniform in [-0.5, 0.5].
inline constexpr double kPromptScale = 0.5;

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

// Prefix tuning (Li and Liang 2021): keys and values before those of an attention. Unless `flat`, an MLP with
// bottleneck_size features makes them.
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

// LoRA (Hu et al. 2021), and what the library makes of the same fields: (IA)^3 (composition_mode "scale"), DoRA
// (use_dora), VeRA (vera_d and vera_b), MTL-LoRA.
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
  // Not the library's, for LoRAs of PEFT. Written to JSON only where they are set. On the attention's output
  // projection; on the gate of a gated feed-forward block; on linear maps outside of the layers, by their paths;
  // whether updates have a bias.
  bool attn_output_lora = false;
  bool gate_lora = false;
  std::vector<std::string> linear_maps = {};
  bool lora_bias = false;
  // MTLLoRAConfig, a LoRAConfig whose update sums several up-projections (Yang et al. 2024), and its own fields.
  bool mtl_lora = false;
  int64_t n_up_projection = 1;
  std::string task_specific_matrix_type = "singular_values";
  double weights_sharpness = 0.05;
};

// Prompt tuning (Lester et al. 2021): tokens before the embedded ones ("prefix"), or behind the first of them
// ("prefix_after_bos").
struct PromptTuningConfig {
  int64_t prompt_length = 10;
  std::string prompt_init = "random_uniform";  // or "from_string", which needs a tokenizer
  std::optional<std::string> prompt_init_text;
  std::string combine = "prefix";
  std::optional<int64_t> init_weights_seed;
  // No dataclass field in the library, which loses it whenever it writes a configuration. Written to JSON only where it
  // is another number.
  double random_uniform_scale = kPromptScale;
};

// One method.
using MethodConfig = std::variant<BnConfig, PrefixTuningConfig, LoRAConfig, ReftConfig, PromptTuningConfig>;

// All methods under one adapter name; a single method is a union of one.
struct AdapterConfig {
  std::vector<MethodConfig> methods;
  // The model_type ("albert", "gptj", "encoder-decoder") of an adapter that the library has trained, where the library
  // wires bottlenecks of that model in its own way: see BottleneckWiring in plan/plan.h. Empty: as defined. "clip": the
  // numbers of layers are the library's; the adapters of a module have numbered_as_found() instead.
  std::string wired_for = {};
  // Read from a directory of the library with prefixes, on a model in which it may count prefixes when it computes
  // relative positions. Not written: who loads the directory checks it.
  bool may_move_positions = false;
  // Whether an invertible adapter's inverse stands before the output embeddings, as it is defined. AdapterHub leaves it
  // out in models with heads of the transformers library.
  bool inverts_output = true;
  bool inverts_output_is_known = true;  // false: read from a directory that does not say it; the value is a guess
  // Over which tokens gates are means, see gate_pooling.h. "all" without gates.
  std::string gate_pooling = "all";
};

}  // namespace torchgraft
