#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// LoRAs whose matrices are products of others. No product depends on an input: the op reads an ordinary LoRA, whose
// matrices are computed once or, while the factors are trained, in every pass.
//   VeRA (Kopiczko et al. 2024), as the adapters library has it: lora_a = A, lora_b = b B d. A and B are random, never
//   trained, and one pair for all layers; b [out, out] and d [r, r] are full matrices, diagonal when they are fresh.
//   MTL-LoRA (Yang et al. 2024): lora_b = (sum over i of softmax(w / sharpness)_i B_i) diag(t); lora_a is as in LoRA.
enum class LoRAFactors { kNone, kVera, kMtlLora };
LoRAFactors lora_factors(const LoRAConfig& config);
LoRAFactors lora_factors(const PlannedModule& module);

// The key of a Reparametrisation for VeRA's "lora_A" [r, in] and "lora_B" [out, r].
constexpr const char* kSharedVera = "shared_vera";

// The key for a module's own factors: "layer_0_selfattn_lora_q". VeRA has "vera_d" and "vera_b", MTL-LoRA "task_b"
// [n, out, r], "task_values" [r] and "task_weights" [n].
std::string lora_factors_key(const PlannedModule& module);

// Names and shapes of a module's own factors; empty for others than these LoRAs.
std::map<std::string, std::vector<int64_t>> own_factor_shapes(const PlannedModule& module);

// The weights of a module that are computed from factors.
std::vector<std::string> factored_names(const PlannedModule& module);

// Whether `sources` has the factors of this module.
bool has_lora_factors(const PlannedModule& module, const Reparametrisation& sources);

// Computes those weights from the factors, in their dtype. VeRA's lora_a is the shared tensor itself.
ModuleWeights factored_weights(const PlannedModule& module, const Reparametrisation& sources);

// Gives all VeRAs of one adapter the same tensor as lora_a.
void share_vera_matrix(const Plan& plan, AdapterWeights& weights);

// Throws c10::Error where the VeRAs of a plan differ in shape: their random matrices are one pair.
void check_vera_shapes(const Plan& plan);

}  // namespace torchgraft
