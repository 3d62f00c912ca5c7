#pragma once

#include <torchgraft/plan/plan.h>

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// Parameters of one adapter at one site, without the bank dimension. Names and shapes:
//   LoRA        lora_a [r, in], lora_b [out, r], scaling [] (alpha / r, or 1 when gated)
//   (IA)^3      lora_b [out, 1], scaling []
//   DoRA        as LoRA, and magnitude [out], weight_norm [out] (norms of the rows of W + B A when it was grafted),
//               fixed [out] (what the magnitude does not scale: the bias, for adapters of PEFT)
//   bottleneck  down_weight [R, H], down_bias [R], up_weight [H, R], up_bias [H], scaling [1] or [H],
//               norm_before_weight, norm_before_bias, norm_after_weight, norm_after_bias [H] (ln_before, ln_after)
//   prefix      prefix_key [h_kv, P, d], prefix_value [h_kv, P, d] (the prefix MLP already computed: "ejected")
//   each, when gated: gate_weight [G, H or in], gate_bias [G]; G is 2 for a prefix with shared_gating=False, else 1
using ModuleWeights = std::map<std::string, at::Tensor>;

// One entry per module of the plan, in the plan's order.
using AdapterWeights = std::vector<ModuleWeights>;

// What an adapter's weights are computed from while the adapter is trained. A frozen adapter does not keep it. Keys:
//   "self_prefix", "encoder_prefix", "cross_prefix"   the MLP of the prefixes at that location, see plan/prefix_mlp.h
//   "layer_0_output_adapter", "shared_phm"            factors of Compacter's projections, see plan/phm.h
using Reparametrisation = std::map<std::string, ModuleWeights>;

// A flat state dict as a checkpoint holds it.
using StateDict = std::map<std::string, at::Tensor>;

// Draws fresh weights with the oracle's distributions (init_weights, init_weights_seed) from the default CPU generator,
// so that at::manual_seed makes them repeatable; in the dtype and on the device of `options`. `kept`, if given, gets
// what the weights are computed from.
TORCHGRAFT_PATCH_API AdapterWeights init_weights(const Plan& plan, const at::TensorOptions& options,
                                                 Reparametrisation* kept = nullptr);

// Reads the weights of the adapter `saved_name` from an AdapterHub checkpoint (`pytorch_adapter.bin` of
// `model.save_adapter()`). Matches modules by module path (modulo leading components such as "bert."), else by layer
// number and location. Throws c10::Error on a missing key, on a key left over, and on a shape that does not fit (an
// adapter of another hidden size), naming key, expected and got. `kept`, if given, gets what the weights are computed
// from.
TORCHGRAFT_PATCH_API AdapterWeights adapter_hub_weights(const Plan& plan, const Structure& structure,
                                                        const StateDict& state, const std::string& saved_name,
                                                        const at::TensorOptions& options,
                                                        Reparametrisation* kept = nullptr);

// A key of a checkpoint, and the parameter that adapter_hub_weights reads it into: "layer 0, selfattn_lora_q: lora_a".
struct WeightMatch {
  std::string key;
  std::string place;
};

// Lists the matches that adapter_hub_weights makes, in the plan's order. Prefix MLPs, which layers share, come last.
TORCHGRAFT_PATCH_API std::vector<WeightMatch> adapter_hub_matches(const Plan& plan, const Structure& structure,
                                                                  const StateDict& state,
                                                                  const std::string& saved_name);

}  // namespace torchgraft
