#pragma once

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/plan.h>

#include <vector>

namespace torchgraft {

// The saved parameters of each module of the plan; an entry is empty where the checkpoint has none.
//
// Matches layers by module path (modulo leading components: "bert.encoder.layer.0" is "encoder.layer.0"), or by number
// when the model has no path of the checkpoint. Cuts a LoRA on a packed q, k, v projection (GPT-2) into those of the
// plan. Throws c10::Error for a saved module that fits no module of the plan, or several, and for two that fit the
// same.
std::vector<SavedParameters> match_modules(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure);

}  // namespace torchgraft
