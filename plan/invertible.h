#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// The parameters of an invertible adapter: "f_down_weight", "f_down_bias", "f_up_weight", "f_up_bias" of F, and the
// same of G with "g_".
std::map<std::string, std::vector<int64_t>> invertible_shapes(const PlannedInvertible& planned);

// The name of each in the adapters library's block: "F.0.weight" of "f_down_weight".
const std::map<std::string, std::string>& invertible_names();

}  // namespace torchgraft
