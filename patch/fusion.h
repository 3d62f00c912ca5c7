#pragma once

#include <torchgraft/config/composition.h>
#include <torchgraft/config/fusion_config.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <string>
#include <vector>

// AdapterFusion layers of a grafted module. A composition Fuse(a, b) (compose.h) finds those of the name "a,b", or of
// its own name.
namespace torchgraft {

// Returns a copy of the grafted `module` with fresh AdapterFusion layers for a Fuse, under the name that the Fuse finds
// them by. They are where its adapters are bottlenecks, in all layers, and start as the library's do. `trainable`: they
// are to be trained (train.h). Throws c10::Error when there are layers of that name, or when the adapters have
// bottlenecks at different locations.
TORCHGRAFT_PATCH_API torch::jit::Module add_adapter_fusion(const torch::jit::Module& module, const Composition& fuse,
                                                           const FusionConfig& config, bool trainable = false);

// Returns a copy of the grafted `module` with the AdapterFusion layers of a state dict of the adapters library, whose
// name there is config.name. `name`: the name in the copy; empty: the same. Layers of that name are replaced. Throws
// c10::Error for a key that is no weight of them, and for a layer that the model lacks.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter_fusion(const torch::jit::Module& module,
                                                            const FusionConfig& config, const StateDict& weights,
                                                            const std::string& name = "");

// The same from a directory with adapter_fusion_config.json and model_adapter_fusion.safetensors.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter_fusion(const torch::jit::Module& module,
                                                            const std::string& directory, const std::string& name = "");

// Writes the layers of a name into a directory, as the library keeps it. All files are written, or none. Throws
// c10::Error when the directory holds layers of another name, unless `overwrite` says that they may go.
TORCHGRAFT_PATCH_API void save_adapter_fusion(const torch::jit::Module& module, const std::string& name,
                                              const std::string& directory, bool overwrite = false);

// Throws c10::Error when `directory` holds other layers than those of `name`.
TORCHGRAFT_PATCH_API void check_replaces_fusion(const std::string& directory, const std::string& name);

// A copy without the layers of a name. Throws c10::Error when there are none, or a composition uses them.
TORCHGRAFT_PATCH_API torch::jit::Module remove_adapter_fusion(const torch::jit::Module& module,
                                                              const std::string& name);

// The configurations of the module's AdapterFusion layers, with their names.
TORCHGRAFT_PATCH_API std::vector<FusionConfig> list_adapter_fusions(const torch::jit::Module& module);

}  // namespace torchgraft
