#pragma once

#include <torchgraft/plan/module_weights.h>

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// A tensor of a checkpoint, with its key.
struct SavedTensor {
  std::string key;
  at::Tensor tensor;
};

// By our name of the parameter: lora_a, down_weight, gate_bias, ... (module_weights.h); of a prefix's MLP: embeddings,
// down_weight, down_bias, up_weight, up_bias, or flat; of Compacter: down_W_left, up_phm_rule, ... (phm.h); of ReFT:
// source_weight_0, original_0, ... (reft_weights.h).
using SavedParameters = std::map<std::string, SavedTensor>;

// The adapters library's name of a prompt's only parameter.
inline constexpr const char* kSavedPrompt = "prompt_embedding.weight";

// The oracle's containers of adapter modules.
enum class SavedKind { kLoRA, kBottleneck, kPrefixGate, kReft };

// What the checkpoint holds for one module of the model it was trained on.
struct SavedModule {
  SavedKind kind;
  std::vector<std::string> path;  // components of the adapted module's path: encoder, layer, 0, attention, self, query
  SavedParameters parameters;
};

// An AdapterHub checkpoint, sorted.
struct Checkpoint {
  std::vector<SavedModule> modules;
  std::map<std::string, SavedParameters> prefixes;  // the prefix pool, by the adapters library's location key
  SavedParameters invertible;                       // by the adapters library's names: "F.0.weight"
  SavedParameters prompt;                           // likewise: "prompt_embedding.weight"
  SavedParameters shared;                           // Compacter's and VeRA's, by the adapters library's names
};

std::vector<std::string> split_path(const std::string& path);

// Whether a component of a path is a number.
bool is_number(const std::string& component);

// Sorts a state dict; throws c10::Error for a key that is not a weight of adapter `name`.
Checkpoint sort_checkpoint(const StateDict& state, const std::string& name);

}  // namespace torchgraft
