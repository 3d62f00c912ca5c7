#pragma once

#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/structure.h>
#include <torchgraft/registration/export.h>

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace torchgraft {

// Reads the weights of the adapter `saved_name` from an AdapterHub checkpoint (`pytorch_adapter.bin` of
// `model.save_adapter()`). Matches modules by module path (modulo leading components such as "bert."), else by layer
// number and location. Throws c10::Error on a missing key, on a key left over, and on a shape that does not fit (an
// adapter of another hidden size), naming key, expected and got. `kept`, if given, gets what the weights are computed
// from.
TORCHGRAFT_PATCH_API AdapterWeights adapter_hub_weights(const Plan& plan, const Structure& structure,
                                                        const StateDict& state, const std::string& saved_name,
                                                        const at::TensorOptions& options,
                                                        Reparametrisation* kept = nullptr);

// A key of a checkpoint, and the parameter that adapter_hub_weights reads it into: "layer 0, selfattn_lora_q: lora_a".
struct WeightMatch {
  std::string key;
  std::string place;
};

// Lists the matches that adapter_hub_weights makes, in the plan's order. Prefix MLPs, which layers share, come last.
TORCHGRAFT_PATCH_API std::vector<WeightMatch> adapter_hub_matches(const Plan& plan, const Structure& structure,
                                                                  const StateDict& state,
                                                                  const std::string& saved_name);

}  // namespace torchgraft
