#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/plan/module_weights.h>

#include <string>

namespace torchgraft {

// Weights of a head: dense_weight [layers - 1, H, H], dense_bias [layers - 1, H], out_weight [num_labels, H] and
// out_bias [num_labels].

// Fresh weights, as the library's for BERT: normal with standard deviation 0.02, biases 0.
ModuleWeights init_head(const HeadConfig& config, int64_t hidden_size, const at::TensorOptions& options);

// Reads weights from, and writes them to, a state dict with the keys of the library's head `name`:
// "heads.<name>.<position>.weight". Throws c10::Error on a key that is missing or left over, and on a shape that does
// not fit.
ModuleWeights head_weights(const HeadConfig& config, int64_t hidden_size, const StateDict& state,
                           const std::string& name, const at::TensorOptions& options);
StateDict head_state(const HeadConfig& config, const ModuleWeights& weights, const std::string& name);

}  // namespace torchgraft
