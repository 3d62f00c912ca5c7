#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <string>

namespace torchgraft {

// Over which tokens gates are means. "all": all tokens, padding included, as in the adapters library. "unpadded": the
// tokens that are not padding, so that a row's output does not depend on how far its batch was padded. An adapter was
// trained with one of them, and keeps it: adapter_config.json has "unpadded" beside its "config".
inline constexpr const char* kAllTokens = "all";
inline constexpr const char* kUnpaddedTokens = "unpadded";

// Throws c10::Error, on behalf of `what`, unless `pooling` is one of the two.
void check_gate_pooling(const std::string& pooling, const char* what);

// Whether an adapter of this configuration has a gate.
TORCHGRAFT_PATCH_API bool has_gates(const AdapterConfig& config);

// Whether an adapter of this configuration has gates that are means over unpadded tokens.
TORCHGRAFT_PATCH_API bool pools_unpadded(const AdapterConfig& config);

// Whether it has ReFT, which counts real tokens; whether anything of it asks which tokens are real.
bool has_reft(const AdapterConfig& config);
bool reads_token_mask(const AdapterConfig& config);

}  // namespace torchgraft
