#pragma once

#include <torchgraft/registration/export.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// AdapterFusion's configuration (AdapterFusionConfig of the adapters library; Pfeiffer et al. 2021), and what its
// directory says besides. Defaults are those of StaticAdapterFusionConfig.
struct FusionConfig {
  bool key = true;
  bool query = true;
  bool value = false;
  bool query_before_ln = false;
  bool regularization = false;
  bool residual_before = false;
  bool temperature = false;
  bool value_before_softmax = true;
  bool value_initialized = false;
  std::optional<double> dropout_prob = std::nullopt;

  std::string name = {};                   // of the fusion: "a,b"
  std::vector<std::string> adapters = {};  // in the order in which they are fused
};

// Throws c10::Error for temperature=true, whose results depend on how often the library ran, and for a dropout_prob
// that is not at least 0 and below 1. Whoever takes a FusionConfig calls it: a caller may have filled one by hand.
TORCHGRAFT_PATCH_API void check_supported(const FusionConfig& config);

// Reads an adapter_fusion_config.json. Throws c10::Error for a key that is not known, and as check_supported() does.
TORCHGRAFT_PATCH_API FusionConfig fusion_config_from_json(std::string_view text);

// The configuration with name and adapters: {"config": {...}, "name": ..., "adapter_names": [...]}.
TORCHGRAFT_PATCH_API std::string fusion_config_to_json(const FusionConfig& config);

}  // namespace torchgraft
