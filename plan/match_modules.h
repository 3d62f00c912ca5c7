#pragma once

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/plan.h>

#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// The saved parameters of each module of the plan; an entry is empty where the checkpoint has none.
//
// Matches layers by module path (modulo leading components: "bert.encoder.layer.0" is "encoder.layer.0"), or by number
// when the model has no path of the checkpoint. Cuts a LoRA on a packed q, k, v projection (GPT-2) into those of the
// plan. Throws c10::Error for a saved module that fits no module of the plan, or several, and for two that fit the
// same.
std::vector<SavedParameters> match_modules(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure);

// Where a LoRA on the linear map at `path` of another model acts in a model that has no paths (a frozen one): by the
// layer's number, and by the names in `path`. (position in structure.layers, site), several for packed projections;
// none where the number or the names are not known.
TORCHGRAFT_PATCH_API std::vector<std::pair<int64_t, std::string>> lora_sites_by_number(const Structure& structure,
                                                                                       const std::string& path);

}  // namespace torchgraft
