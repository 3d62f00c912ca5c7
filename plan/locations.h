#pragma once

#include <torchgraft/plan/structure.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// The position of a site ("selfattn_lora_q", "output_adapter") among the sites of a layer, in the order in which they
// run: projections, the attention itself, what follows it, the feed-forward block. The one such list: plans and slots
// are sorted by it.
size_t execution_order(const std::string& site);

// The oracle's location keys that `layer` has a site for.
std::vector<std::string> available_locations(const Layer& layer);

// Where a prefix of this layer's attention is: self_prefix, encoder_prefix or cross_prefix.
std::string prefix_location(const Layer& layer);

// The bottleneck after this layer's attention: mh_adapter, or cross_adapter after cross attention.
std::string attention_adapter_location(const Layer& layer);

// The sites of LoRAs on linear maps outside of the layers are this and a position in Layer::linear_maps. A plan has
// them at the first layer.
inline constexpr std::string_view kLinearMapSite = "linear_lora_";

// The position behind kLinearMapSite; nullopt for other sites.
std::optional<size_t> linear_map_position(const std::string& site);

}  // namespace torchgraft
