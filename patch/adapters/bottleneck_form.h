#pragma once

#include <torchgraft/plan/plan.h>

#include <string>

namespace torchgraft {

// Where a bottleneck reads its input: the branch before the residual add ("seq"), the normalised sum of branch and
// residual ("seq_ln", original_ln_before), or the residual ("par").
enum class BottleneckInput { kBranch, kNormedSum, kResidual };

// What its result is added to (residual_before_ln, which matters with original_ln_before only).
enum class BottleneckResidual { kBranch, kSum, kNormedSum };

// What a configuration changes in the graph around the op, beyond the op's parameters. Adapters of one form share an
// op.
struct BottleneckForm {
  BottleneckWiring wiring = BottleneckWiring::kDefined;
  BottleneckInput input = BottleneckInput::kBranch;
  BottleneckResidual residual = BottleneckResidual::kBranch;
  bool norm_before = false;         // ln_before
  bool norm_after = false;          // ln_after
  bool residual_in_norm = false;    // adapter_residual_before_ln, with ln_after: LN(adapter + residual)
  bool replaces_norm = false;       // not original_ln_after: its result replaces that of the norm or add behind it
  bool scaling_is_trained = false;  // "learned" or "channel"
  std::string non_linearity;

  // Just one gated_bottleneck op on the branch.
  bool is_plain() const {
    return residual == BottleneckResidual::kBranch && !norm_before && !norm_after && !replaces_norm;
  }
};

BottleneckForm bottleneck_form(const PlannedBottleneck& planned);

// The part of a slot's name behind the location: "seq_ln_relu", "seq_ln_add_norm_after_swish".
std::string to_string(const BottleneckForm& form);

}  // namespace torchgraft
