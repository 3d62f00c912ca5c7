#include <torchgraft/plan/locations.h>

#include <c10/util/Exception.h>

#include <algorithm>

namespace torchgraft {

size_t execution_order(const std::string& site) {
  static const std::vector<std::string> kSites = {
      "inv_adapter",      "prompt_tuning",     "selfattn_lora_q",  "selfattn_lora_k", "selfattn_lora_v",
      "crossattn_lora_q", "crossattn_lora_k",  "crossattn_lora_v", "self_prefix",     "encoder_prefix",
      "cross_prefix",     "selfattn_lora_o",   "crossattn_lora_o", "mh_adapter",      "cross_adapter",
      "gate_lora",        "intermediate_lora", "output_lora",      "output_adapter",  "output_reft"};
  if (linear_map_position(site)) {
    return kSites.size();
  }
  const auto found = std::find(kSites.begin(), kSites.end(), site);
  TORCH_INTERNAL_ASSERT(found != kSites.end(), "no execution order for ", site);
  return static_cast<size_t>(found - kSites.begin());
}

std::optional<size_t> linear_map_position(const std::string& site) {
  return site.starts_with(kLinearMapSite) ? std::optional<size_t>(std::stoull(site.substr(kLinearMapSite.size())))
                                          : std::nullopt;
}

std::string prefix_location(const Layer& layer) {
  switch (layer.kind) {
    case AttentionKind::kSelf:
      return "self_prefix";
    case AttentionKind::kEncoder:
      return "encoder_prefix";
    case AttentionKind::kCross:
      return "cross_prefix";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown attention kind");
}

std::string attention_adapter_location(const Layer& layer) {
  return layer.kind == AttentionKind::kCross ? "cross_adapter" : "mh_adapter";
}

std::vector<std::string> available_locations(const Layer& layer) {
  std::vector<std::string> result;
  if (layer.has_core) {
    result.push_back(prefix_location(layer));
  }
  if (layer.query || layer.key || layer.value) {
    result.emplace_back("selfattn_lora");
  }
  if (layer.has_attention_residual) {
    result.push_back(attention_adapter_location(layer));
  }
  if (layer.ffn_in) {
    result.emplace_back("intermediate_lora");
  }
  if (layer.ffn_out) {
    result.emplace_back("output_lora");
  }
  if (layer.has_ffn_residual) {
    result.emplace_back("output_adapter");
  }
  if (layer.has_end) {
    result.emplace_back("output_reft");
  }
  return result;
}

}  // namespace torchgraft
