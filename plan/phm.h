#pragma once

#include <torchgraft/config/adapter_config.h>

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

namespace torchgraft {

// The projections of Compacter (Karimi Mahabadi et al. 2021; PHMLayer of the adapters library): a weight [in, out] that
// is the sum of n = phm_dim Kronecker products of a rule [n, n] and a block [in / n, out / n]. Like a prefix's MLP it
// depends on no input: it is computed once, and what is grafted is an ordinary bottleneck.

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

}  // namespace torchgraft
