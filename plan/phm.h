#pragma once

#include <torchgraft/plan/adapter_weights.h>

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

namespace torchgraft {

// The projections of Compacter (Karimi Mahabadi et al. 2021; PHMLayer of the adapters library): a weight [in, out] that
// is the sum of n = phm_dim Kronecker products of a rule [n, n] and a block [in / n, out / n]. Like a prefix's MLP it
// depends on no input: what the op reads is an ordinary bottleneck, whose weights are computed once, or, while the
// factors are trained, in every pass.

// One side of a bottleneck.
struct PhmShape {
  int64_t in = 0;
  int64_t out = 0;
  const char* side = "";  // "down" or "up"
};

// Gives the factor of a name: "phm_rule" [n, n, n] or "phm_rule_left" [n, n, 1] and "phm_rule_right" [n, 1, n]; "W"
// [n, in / n, out / n] or "W_left" [n, in / n, rank] and "W_right" [n, rank, out / n]; `shared` by all modules.
using PhmFactors = std::function<at::Tensor(const std::string& name, at::IntArrayRef shape, bool shared)>;

// The weight [out, in]. Throws c10::Error when phm_dim does not divide in and out.
at::Tensor phm_weight(const BnConfig& config, const PhmShape& shape, const PhmFactors& factors);

// What all modules of an adapter share.
constexpr const char* kSharedPhm = "shared_phm";

// Where a Reparametrisation keeps a factor of `module`: "down_W_left" in "layer_0_output_adapter", or with the
// library's name of what all share, "W_down_left" or "phm_rule_left", in "shared_phm".
struct PhmPlace {
  std::string source;
  std::string name;
};
PhmPlace phm_place(const PlannedModule& module, const std::string& side, const std::string& factor, bool shared);

// Whether `sources` has the factors of `module`, a bottleneck.
bool has_phm_factors(const PlannedModule& module, const Reparametrisation& sources);

// down_weight and up_weight out of these factors.
ModuleWeights phm_weights(const PlannedModule& module, const Reparametrisation& sources);

}  // namespace torchgraft
