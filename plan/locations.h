#pragma once

#include <torchgraft/plan/structure.h>

#include <string>
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

}  // namespace torchgraft
