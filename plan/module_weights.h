#pragma once

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
//   invertible  f_down_weight, ..., g_up_bias (plan/invertible.h)
//   prefix      prefix_key [h_kv, P, d], prefix_value [h_kv, P, d] (the prefix MLP already computed: "ejected")
//   ReFT        source_weight [U, r, H], source_bias [U, r], projection [U, r, H], U units of parameters (1 when
//               they are tied); positions (int64) [2], subtraction [] (1 where the projection is subtracted, else 0)
//   each, when gated: gate_weight [G, H or in], gate_bias [G]; G is 2 for a prefix with shared_gating=False, else 1
using ModuleWeights = std::map<std::string, at::Tensor>;

// One entry per module of the plan, in the plan's order.
using AdapterWeights = std::vector<ModuleWeights>;

// What an adapter's weights are computed from while the adapter is trained. A frozen adapter does not keep it. Keys:
//   "self_prefix", "encoder_prefix", "cross_prefix"   the MLP of the prefixes at that location, see plan/prefix_mlp.h;
//                                                     in a whole CLIP of each tower's (PlannedPrefix::pool)
//   "layer_0_output_adapter", "shared_phm"            factors of Compacter's projections, see plan/phm.h
//   "layer_0_selfattn_lora_q", "shared_vera"          factors of VeRA and MTL-LoRA, see plan/lora_factors.h
//   "layer_0_output_reft"                             an orthogonal projection's, see plan/reft_weights.h
using Reparametrisation = std::map<std::string, ModuleWeights>;

// A flat state dict as a checkpoint holds it.
using StateDict = std::map<std::string, at::Tensor>;

}  // namespace torchgraft
