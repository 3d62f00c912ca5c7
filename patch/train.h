#pragma once

#include <torchgraft/patch/graft.h>

#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// Training. An adapter is *frozen*, a row of the banks without gradients, or *trainable* (AdapterSpec::trainable): then
// it has parameters of its own in the module, the MLPs of its prefixes and the factors of Compacter among them, and its
// dropout acts in training mode. DoRA's norms follow its LoRA, with gradients, as in the adapters library.
// The base's weights of a module with a trainable adapter require no gradients.

// The parameters of a trainable adapter, and of its head, with their names in the module, in an order that is the same
// for every copy of it. They are the module's own tensors: an optimizer that steps on them trains the module. Throws
// c10::Error when the adapter is unknown, or frozen.
TORCHGRAFT_PATCH_API std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(
    const torch::jit::Module& module, const std::string& name);

// A copy in which the adapter is a row of the banks: what is served. Its prefixes and Compacter's projections are
// computed ("ejected"), and the MLPs and factors that made them dropped. Freezing a frozen adapter changes nothing.
TORCHGRAFT_PATCH_API torch::jit::Module freeze_adapter(const torch::jit::Module& module, const std::string& name);

// A copy in which the adapter is trainable. Of prefixes that were ejected the keys and values themselves are trained,
// as of flat ones. Throws c10::Error for an adapter that is merged, and for Compacter, whose factors a frozen adapter
// has not kept.
TORCHGRAFT_PATCH_API torch::jit::Module unfreeze_adapter(const torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
