#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

namespace torchgraft {

// Throws c10::Error naming the first field whose value this version does not support, and what it would accept.
TORCHGRAFT_PATCH_API void check_supported(const AdapterConfig& config);

}  // namespace torchgraft
