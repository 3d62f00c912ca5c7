#include <torchgraft/plan/saved_config.h>

#include <torchgraft/plan/phm.h>

#include <algorithm>
#include <utility>

namespace torchgraft {
namespace {

// `config` with the form that prefixes and bottlenecks have with these sources.
AdapterConfig with_sources(AdapterConfig config, const Reparametrisation& sources) {
  const auto is_kept = [&](const char* ending) {
    return std::any_of(sources.begin(), sources.end(),
                       [&](const auto& entry) { return entry.first.ends_with(ending); });
  };
  for (MethodConfig& method : config.methods) {
    if (auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
      prefix->flat = prefix->flat || !is_kept("_prefix");
    } else if (auto* bottleneck = std::get_if<BnConfig>(&method)) {
      bottleneck->phm_layer = bottleneck->phm_layer && (is_kept("_adapter") || is_kept(kSharedPhm));
    }
  }
  return config;
}

}  // namespace

AdapterConfig ejected_config(const AdapterConfig& config) { return with_sources(config, {}); }

AdapterConfig saved_config(AdapterConfig config, const Reparametrisation& sources) {
  const bool has_factors = std::any_of(sources.begin(), sources.end(), [](const auto& entry) {
    return entry.second.count("vera_d") || entry.second.count("task_b");
  });
  config = with_sources(std::move(config), sources);
  for (MethodConfig& method : config.methods) {
    if (auto* lora = std::get_if<LoRAConfig>(&method); lora && !has_factors) {
      lora->vera_d.reset();
      lora->vera_b.reset();
      lora->mtl_lora = false;
    }
  }
  return config;
}

}  // namespace torchgraft
