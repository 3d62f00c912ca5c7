#pragma once

#include <torchgraft/plan/structure.h>

#include <string>
#include <vector>

namespace torchgraft {

// The oracle's location keys that `layer` has a place for.
std::vector<std::string> available_locations(const Layer& layer);

// Where a prefix of this layer's attention is: self_prefix, encoder_prefix or cross_prefix.
std::string prefix_location(const Layer& layer);

// The bottleneck after this layer's attention: mh_adapter, or cross_adapter after cross attention.
std::string attention_adapter_location(const Layer& layer);

}  // namespace torchgraft
