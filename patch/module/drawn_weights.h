#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <torch/csrc/jit/api/module.h>

#include <vector>

namespace torchgraft {

struct DrawnCopy {
  torch::jit::Module module;
  bool has_drawn = false;  // whether some weight was zero
};

// A copy of `grafted` for trial runs, in which every weight of `adapters` that is zero is drawn: a fresh LoRA or
// bottleneck changes nothing, and would hide what is wrong around it. The same adapter, by its name, gets the same
// numbers in every module. A DoRA gets another magnitude instead, since its norms depend on its LoRA. Merged adapters
// stay as they are. The copy has buffers of its own, as every clone_module(), and parameters of its own where something
// is drawn; other parameters share their memory.
DrawnCopy with_drawn_weights(const torch::jit::Module& grafted, const std::vector<Adapter>& adapters);

// The same for all adapters that `grafted` has.
DrawnCopy with_drawn_weights(const torch::jit::Module& grafted);

}  // namespace torchgraft
