#pragma once

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft::ops {

// The operators that have fused kernels.
enum class FusedOp { kLora, kLoraLinear, kBottleneck, kBottleneckLinear, kPrefixAttention };

// What a user measured with `scripts/graft.py tune`: for some sizes, the seconds of the fused kernel and of ATen's
// composition.
class KernelTable {
 public:
  KernelTable() = default;  // nothing measured

  // text: JSON as tune writes it; source: what errors name. A table of another instruction set
  // (kernel_instruction_set()) than this process has is about other kernels: nothing of it is taken. Anything else than
  // a table throws c10::Error.
  static KernelTable parse(const std::string& text, const std::string& source);

  // What the nearest size says that was measured (by the sum of the ratios' logarithms). nullopt: none was, of this op
  // and dtype.
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
