#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace torchgraft {

// The text of an AdapterHub adapter_config.json (with its outer {"config": ...}) or of the inner config alone. An
// unknown field, a wrong type or malformed JSON throws c10::Error that names it. The outer "model_type" becomes
// AdapterConfig::wired_for, where it matters, with "model_class" its inverts_output, and the outer "gate_pooling" its
// gate_pooling. The library's names for the two ends of LLaMA's and Mistral's feed-forward block, which it has
// exchanged, become those of all other models.
TORCHGRAFT_PATCH_API AdapterConfig config_from_json(std::string_view json);

// What torchgraft writes beside the inner config of an adapter with prefixes, and the adapters library reads over:
// their heads of keys and values. nullopt: `text` does not say, or is a name.
constexpr const char* kPrefixHeads = "prefix_heads";
TORCHGRAFT_PATCH_API std::optional<int64_t> saved_prefix_heads(std::string_view text);

// The outer key of AdapterConfig::inverts_output, which is written where it is false; null: not known.
constexpr const char* kInvertsOutput = "inverts_output";

// The inner config, every field written, as AdapterConfig.to_dict() of the adapters library: {"architecture": "union",
// ...} for more than one method. If wired_for is set, or gates pool over unpadded tokens, the text is
// {"config": ..., "model_type": ..., "inverts_output": ..., "gate_pooling": ...}, with the keys that apply.
TORCHGRAFT_PATCH_API std::string config_to_json(const AdapterConfig& config);

}  // namespace torchgraft
