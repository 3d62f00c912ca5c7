#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

namespace torchgraft {

// The projections of Compacter (Karimi Mahabadi et al. 2021; PHMLayer of the adapters library). A weight [in, out] is
// the sum of n = phm_dim Kronecker products of a rule [n, n] and a block [in / n, out / n]. The sum depends on no
// input, as a prefix's MLP does not. So the op reads an ordinary bottleneck, whose weights are computed once or, while
// the factors are trained, in every pass.

// One side of a bottleneck.
struct PhmShape {
  int64_t in = 0;
  int64_t out = 0;
  const char* side = "";  // "down" or "up"
};

// Returns the factor `name`: "phm_rule" [n, n, n], or "phm_rule_left" [n, n, 1] and "phm_rule_right" [n, 1, n]; "W"
// [n, in / n, out / n], or "W_left" [n, in / n, rank] and "W_right" [n, rank, out / n]. All modules have the same
// factor when it is `shared`.
using PhmFactors = std::function<at::Tensor(const std::string& name, at::IntArrayRef shape, bool shared)>;

// The weight [out, in]. Throws c10::Error when phm_dim does not divide in and out.
at::Tensor phm_weight(const BnConfig& config, const PhmShape& shape, const PhmFactors& factors);

// The key of a Reparametrisation for factors that all modules of an adapter share.
constexpr const char* kSharedPhm = "shared_phm";

// The key and name of a factor of `module` in a Reparametrisation: "layer_0_output_adapter" and "down_W_left". Shared
// factors are in "shared_phm" and have the library's names: "W_down_left", "phm_rule_left".
struct PhmSource {
  std::string source;
  std::string name;
};
PhmSource phm_place(const PlannedModule& module, const std::string& side, const std::string& factor, bool shared);

// Whether `sources` has the factors of this module.
bool has_phm_factors(const PlannedModule& module, const Reparametrisation& sources);

// Computes down_weight and up_weight from these factors.
ModuleWeights phm_weights(const PlannedModule& module, const Reparametrisation& sources);

}  // namespace torchgraft
