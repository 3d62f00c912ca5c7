#pragma once

#include <torchgraft/patch/graft.h>

#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// Training. A *frozen* adapter is a row of the banks and has no gradients. A *trainable* one (AdapterSpec::trainable)
// has parameters of its own in the module, among them the MLPs of its prefixes and the factors of Compacter. Its
// dropout acts in training mode. DoRA's norms follow its LoRA, with gradients, as in the adapters library. In a module
// with a trainable adapter the base's weights require no gradients.

// A composition is trained as an adapter is: `name` may be one in trainable_parameters(), whose adapters that are
// trainable are trained where they stand in it (MAD-X); and a composition with a Fuse below, too. Then its
// AdapterFusion layers and its head are trained, and the adapters in it stay frozen. Where the library drops out the
// scores of a Fuse while it trains, so does the module in training mode, with the configuration's dropout_prob; without
// one, not.

// The parameters of a trainable adapter and of its head, with their names in the module. Every copy of the module has
// them in the same order. They are the module's own tensors: an optimizer that steps on them trains the module. Of a
// composition: the parameters of all that is trainable in it. Throws c10::Error when the name is unknown, and when
// nothing is trainable: neither the adapter, nor anything in the composition.
TORCHGRAFT_PATCH_API std::vector<std::pair<std::string, at::Tensor>> trainable_parameters(
    const torch::jit::Module& module, const std::string& name);

// Returns a copy in which the adapter is a row of the banks, ready to be served. Prefixes and Compacter's projections
// are computed ("ejected"); the MLPs and factors that they came from are dropped. Freezing a frozen adapter changes
// nothing. Of a composition with a Fuse: freezes its AdapterFusion layers and its head. Throws c10::Error for an
// unknown name, and for a composition without a Fuse, which has no weights of its own.
TORCHGRAFT_PATCH_API torch::jit::Module freeze_adapter(const torch::jit::Module& module, const std::string& name);

// Returns a copy in which the adapter is trainable. Ejected prefixes are then trained as keys and values, as flat ones
// are. Of a composition with a Fuse: its AdapterFusion layers and its head; the adapters in it stay as they are. Throws
// c10::Error for a merged adapter, for a Compacter, whose factors freezing has dropped, for an adapter in a composition
// with a Fuse, and as freeze_adapter() does.
TORCHGRAFT_PATCH_API torch::jit::Module unfreeze_adapter(const torch::jit::Module& module, const std::string& name);

// What the library adds to the loss while it trains AdapterFusion layers, whatever their `regularization` says: 0.01
// times the sum of squares of (1 - V), of the value matrices V that are trained in the composition `name`. 0 where the
// layers have none. Throws c10::Error when no composition with a Fuse has that name, and when its layers are frozen.
TORCHGRAFT_PATCH_API at::Tensor fusion_regularization_loss(const torch::jit::Module& module, const std::string& name);

}  // namespace torchgraft
