#include <torchgraft/config/gate_pooling.h>

#include <c10/util/Exception.h>

#include <algorithm>

namespace torchgraft {

void check_gate_pooling(const std::string& pooling, const char* what) {
  TORCH_CHECK(pooling == kAllTokens || pooling == kUnpaddedTokens, what,
              ": expected gate_pooling \"all\" or \"unpadded\", got \"", pooling, "\"");
}

bool has_gates(const AdapterConfig& config) {
  return std::any_of(config.methods.begin(), config.methods.end(), [](const MethodConfig& method) {
    return std::visit(
        [](const auto& held) {
          if constexpr (requires { held.use_gating; }) {
            return held.use_gating;
          }
          return false;
        },
        method);
  });
}

bool has_reft(const AdapterConfig& config) {
  return std::any_of(config.methods.begin(), config.methods.end(),
                     [](const MethodConfig& method) { return std::holds_alternative<ReftConfig>(method); });
}

bool reads_token_mask(const AdapterConfig& config) { return pools_unpadded(config) || has_reft(config); }

bool pools_unpadded(const AdapterConfig& config) { return config.gate_pooling == kUnpaddedTokens && has_gates(config); }

}  // namespace torchgraft
