#pragma once

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft::ops {

// The operators that have fused kernels.
enum class FusedOp { kLora, kLoraLinear, kBottleneck, kBottleneckLinear, kPrefixAttention, kLinear };

// What a user measured with `torchgraft tune`: for some sizes, the seconds of the fused kernel and of ATen's
// composition.
class KernelTable {
 public:
  KernelTable() = default;  // nothing measured

  // text: JSON as tune writes it; source: what errors name. A table for another instruction set than
  // kernel_instruction_set() was measured with other kernels: its measurements are dropped. Text that is no table
  // throws c10::Error.
  static KernelTable parse(const std::string& text, const std::string& source);

  // What was measured at the nearest size (by the sum of the ratios' logarithms). nullopt: nothing was, for this
  // operator and dtype.
  std::optional<bool> fused_is_faster(FusedOp op, at::ScalarType type, int64_t tokens, int64_t features) const;

 private:
  struct Measurement {
    FusedOp op;
    at::ScalarType type;
    double log_tokens;
    double log_features;
    bool fused_is_faster;
  };
  std::vector<Measurement> measurements_;
};

}  // namespace torchgraft::ops
