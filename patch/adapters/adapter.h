#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/plan.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

struct Head {
  HeadConfig config;
  ModuleWeights weights;  // see plan/head_weights.h
};

// One named adapter with its weights, one entry per module of its plan.
struct Adapter {
  std::string name;
  AdapterConfig config;
  Plan plan = {};
  AdapterWeights weights = {};
  bool merged = false;             // a LoRA that is in the base's weights: its scaling is 0
  bool trainable = false;          // has parameters of its own instead of rows of the banks
  Reparametrisation sources = {};  // what a trainable adapter's `weights` are computed from
  std::optional<Head> head = std::nullopt;
};

// Whether `planned` is a LoRA with factors that modules of its adapter share, and that so have one dtype.
bool has_factors(const PlannedModule& planned);

// Over which tokens the gates of some adapters are means. An adapter without gates counts as one whose gates, of
// exactly 1, are means over all tokens.
struct GatePoolings {
  bool all = false;
  bool unpadded = false;

  bool is_mixed() const { return all && unpadded; }
};
GatePoolings gate_poolings(const std::vector<Adapter>& adapters);

// `name` as a part of an attribute's name in TorchScript: letters, digits and underscores stay, every other byte
// becomes "_x" with two hexadecimal digits, and so does an underscore before an x. Different names give different
// texts.
std::string attribute_text(const std::string& name);

std::vector<std::string> names_of(const std::vector<Adapter>& adapters);

// Position of `name` among `adapters`. Throws c10::Error that lists the names, on behalf of the function `what`.
size_t find_adapter(const std::vector<Adapter>& adapters, const std::string& name, const char* what);

}  // namespace torchgraft
