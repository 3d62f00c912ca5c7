#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace torchgraft {

// A name without what people write differently: "UniPELT", "UniPELTConfig" and "unipelt" are one, "Prefix Tuning" and
// "prefix_tuning", "(IA)^3" and "ia3".
std::string plain_name(std::string_view name);

// "; did you mean 'alpha'?" with the name in `known` that is closest to `name`; "" when none is close.
std::string did_you_mean(std::string_view name, const std::vector<std::string>& known);

}  // namespace torchgraft
