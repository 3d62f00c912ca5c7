#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <vector>

namespace torchgraft {

// One adapter of several methods. Throws c10::Error where ConfigUnion of the adapters library refuses them: two configs
// of one method must touch different locations. With leave_out the locations are known only for a model: make_plan
// checks them.
TORCHGRAFT_PATCH_API AdapterConfig config_union(std::vector<MethodConfig> methods);

}  // namespace torchgraft
