#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <string_view>

namespace torchgraft {

// A name, with other values perhaps, or a union of several, as the adapters library's configuration strings:
// "seq_bn[reduction_factor=8]|lora[r=16, use_gating=True]". Values are Python literals; true, false and strings without
// quotes are read, too. In a named union, a value goes to every part that has the field: "unipelt[r=4]"
// changes the LoRA, "mam[dropout=0.1]" both parts. Throws c10::Error that says what cannot be read.
TORCHGRAFT_PATCH_API AdapterConfig config_from_string(std::string_view text);

}  // namespace torchgraft
