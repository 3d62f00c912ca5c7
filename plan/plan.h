#pragma once

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/plan/structure.h>

#include <string>
#include <variant>
#include <vector>

namespace torchgraft {

// The factor of B A x: alpha / r, or 1 when a gate replaces it.
double lora_scaling(const LoRAConfig& config);

// How a LoRAConfig changes a projection: adds B A x; multiplies with a vector ((IA)^3, Liu et al. 2022); adds, and then
// gives every output a learned magnitude (DoRA, Liu et al. 2024).
enum class LoRAForm { kAdd, kScale, kDora };
LoRAForm lora_form(const LoRAConfig& config);

// The layer norms of a bottleneck's own: "norm_before", "norm_after" (ln_before, ln_after).
std::vector<std::string> own_norms(const BnConfig& config);

// The methods, each at one site of one layer. `location` is the adapters library's key ("selfattn_lora"); `site`
// names the one linear map, attention or residual add that the method works on. The two differ for LoRA on q, k and v
// only: the sites are selfattn_lora_q, and in cross attention crossattn_lora_q, whose location is selfattn_lora too.
struct PlannedLoRA {
  LoRAConfig config;
  int64_t in_features = 0;
  int64_t out_features = 0;
};

// What a bottleneck takes for the branch and for the residual. As adapters==1.3.0 defines it: the branch is the block's
// result, the residual the stream that the block adds to. Adapters that
// the library trained on models which it wires differently need its wiring (AdapterConfig::wired_for).
enum class BottleneckWiring {
  kDefined,
  kExchanged,   // ALBERT, after attention: the branch is the stream, the residual the block's result
  kAfterOthers  // GPT-J, after the feed-forward block: the residual has the result of the parallel attention, too
};

// A bottleneck beside a residual add (BnConfig).
struct PlannedBottleneck {
  BnConfig config;
  int64_t hidden_size = 0;
  int64_t bottleneck_size = 0;  // max(1, int(hidden_size // reduction_factor of this layer))
  BottleneckWiring wiring = BottleneckWiring::kDefined;
};

// The prefix of one attention. Layers of a group share an MLP that makes their prefixes.
struct PlannedPrefix {
  PrefixTuningConfig config;
  std::string pool;  // the group: the location or, in a whole CLIP, the location in a tower (plan/library_layers.h)
  int64_t hidden_size = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t group_index = 0;  // position among the layers with a prefix: this layer's slice of the prefix MLP's output
  int64_t group_size = 0;   // how many layers share the prefix MLP
};

// An invertible adapter (Pfeiffer et al. 2020, MAD-X; NICE, Dinh et al. 2014) on the embeddings x = [x1, x2]:
// y1 = x1 + F(x2), y2 = x2 + G(y1). Its location and site are "inv_adapter", and it is the first layer's.
struct PlannedInvertible {
  BnConfig config;
  int64_t embedding_size = 0;
  int64_t f_size = 0;  // of the hidden layer of F
  int64_t g_size = 0;
  bool inverts_output = true;  // AdapterConfig::inverts_output
};

// ReFT on what leaves a Transformer layer. Its location and site are "output_reft".
struct PlannedReft {
  ReftConfig config;
  int64_t hidden_size = 0;
};

// Tokens among the embeddings. Its location and site are "prompt_tuning", and it is the first layer's.
struct PlannedPrompt {
  PromptTuningConfig config;
  int64_t embedding_size = 0;
};

// How many of the embedded tokens stand before the prompt.
int64_t prompt_begin(const PromptTuningConfig& config);

// One method with the sizes of its site.
using PlannedMethod =
    std::variant<PlannedLoRA, PlannedBottleneck, PlannedPrefix, PlannedInvertible, PlannedReft, PlannedPrompt>;

// A method and where it acts.
struct PlannedModule {
  int64_t layer = 0;   // Layer::index: which attention
  int64_t number = 0;  // Layer::number: of the Transformer layer
  std::string location;
  std::string site;
  PlannedMethod method;
};

// What make_plan() returns.
using Plan = std::vector<PlannedModule>;

// Lists the modules that `config` puts on `structure`, in execution order (plan/locations.h). A layer that runs again
// shares the modules of its first run. leave_out and reduction_factor count Transformer layers, as the structure does
// or, where wired_for says so, as the adapters library does. Allocates nothing.
// Throws c10::Error when the structure has no layer, when a layer outside `leave_out` lacks a location that the config
// asks for (naming the layers and the remedy), when two configs of a union claim one location, and when the config asks
// for nothing at all.
TORCHGRAFT_PATCH_API Plan make_plan(const Structure& structure, const AdapterConfig& config);

}  // namespace torchgraft
