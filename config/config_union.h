#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <vector>

namespace torchgraft {

// One adapter of several methods. Throws c10::Error where ConfigUnion of the oracle refuses them: two configs of one
// architecture must touch different places. With leave_out the places are known only for a model: make_plan checks
// them.
TORCHGRAFT_PATCH_API AdapterConfig config_union(std::vector<MethodConfig> methods);

}  // namespace torchgraft
