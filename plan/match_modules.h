#pragma once

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/plan.h>

#include <vector>

namespace torchgraft {

// Which saved parameters belong to which module of the plan; one entry per module, empty where the checkpoint has none.
//
// A layer is known by its module path (modulo leading components: "bert.encoder.layer.0" is "encoder.layer.0"). When no
// path of the checkpoint is known in the model, layers are matched by number. A LoRA on a packed q, k, v projection
// (GPT-2) is cut into those of the plan. Throws c10::Error for a saved module that has no place, or more than one, and
// for two with the same place.
std::vector<SavedParameters> match_modules(const Checkpoint& checkpoint, const Plan& plan, const Structure& structure);

}  // namespace torchgraft
