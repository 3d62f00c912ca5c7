#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// The named constructors of the adapters library.
TORCHGRAFT_PATCH_API BnConfig seq_bn_config();
TORCHGRAFT_PATCH_API BnConfig double_seq_bn_config();
TORCHGRAFT_PATCH_API BnConfig par_bn_config();
TORCHGRAFT_PATCH_API AdapterConfig mam_config();
TORCHGRAFT_PATCH_API AdapterConfig unipelt_config();

// The names that `config_from_name` knows, sorted.
TORCHGRAFT_PATCH_API std::vector<std::string> config_names();

// "unipelt", "mam", "seq_bn", "pfeiffer", ..., also written as "UniPELT" or "SeqBnConfig". Throws c10::Error that lists
// the names.
TORCHGRAFT_PATCH_API AdapterConfig config_from_name(std::string_view name);

}  // namespace torchgraft
