#pragma once

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/list_adapters.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// Changes to the adapters of a grafted module. Each function returns a copy and leaves `module` alone, so other threads
// may go on running `module`: swap the copy in when it is ready. The copy shares the memory of the base's weights
// (graph/clone_module.h) and has banks of its own. The active adapter stays active unless it is removed. All functions
// throw c10::Error when nothing is grafted onto `module`, when a name is unknown (the message lists the known ones),
// and when a new name is taken.

// How the result of a change is compared with the module before it: both run on the same inputs, before anything is
// returned. A difference is a c10::Error, what could not be compared a TORCH_WARN.
struct VerifyOptions {
  bool verify = true;
  std::optional<std::vector<c10::IValue>> example = {};  // arguments of forward; nullopt: made up, as in GraftOptions
};

// How merge_adapter() works.
struct MergeOptions {
  bool into_base = false;  // merge also where other adapters are, which then run on the merged weights
  VerifyOptions verifying = {};
};

// Removes adapters and compositions. Later ones move up: their adapter_ids change. Throws c10::Error for the last
// adapter (ungraft gives the base), for a merged one, and for one that a composition uses which stays.
TORCHGRAFT_PATCH_API torch::jit::Module remove_adapters(const torch::jit::Module& module,
                                                        const std::vector<std::string>& names);

// Renames an adapter, also in the compositions that use it, or a composition.
TORCHGRAFT_PATCH_API torch::jit::Module rename_adapter(const torch::jit::Module& module, const std::string& name,
                                                       const std::string& new_name);

// Gives the adapter `spec.name` the configuration and weights of `spec`, and its head or none. The adapter's position
// among adapter_names() stays.
TORCHGRAFT_PATCH_API torch::jit::Module replace_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

// Adds the adapter `name`: each parameter is the sum over i of weights[i] times that parameter of names[i]. Empty
// weights: all equal. `normalise` divides the weights by their sum. The configurations must be equal, up to how weights
// are initialised. The adapters library does the same (average_adapter, combine_strategy="linear"), but for two things:
// here prefixes are averaged as keys and values, not as weights of their MLP, and Compacter is averaged as projections,
// not as factors. VeRA, MTL-LoRA and orthogonal ReFTs are averaged by their factors, so they must be trainable. The
// average is frozen and has no head: heads belong to different tasks.
TORCHGRAFT_PATCH_API torch::jit::Module average_adapters(const torch::jit::Module& module, const std::string& name,
                                                         const std::vector<std::string>& names,
                                                         const std::vector<double>& weights = {}, bool normalise = true,
                                                         const VerifyOptions& verifying = {});

// Adds alpha / r B A of an ungated LoRA to the weights that the LoRA updates, so that it costs nothing at run time. The
// base and all other adapters run on the merged weights too: after deactivate() and with adapter_ids = -1 the result is
// that of the merged model. The adapter stays in its bank without effect, for unmerge_adapter. Merged weights are
// copies: the module's own stay as they are. ungraft() of the result gives the merged model.
//
// Throws c10::Error when
//   the adapter has a gate, a bottleneck or a prefix, which no weight can hold;
//   a weight is a constant of the graph (a frozen module);
//   a weight is used in another place too, in forward or in another method, where the adapter does not act;
//   the module has other adapters, unless MergeOptions::into_base says that they are to run on the merged weights.
TORCHGRAFT_PATCH_API torch::jit::Module merge_adapter(const torch::jit::Module& module, const std::string& name,
                                                      const MergeOptions& options = {});

// Subtracts a merged LoRA from the weights again, up to rounding: sums are taken in float64.
TORCHGRAFT_PATCH_API torch::jit::Module unmerge_adapter(const torch::jit::Module& module, const std::string& name,
                                                        const VerifyOptions& verifying = {});

// Returns a copy whose forward consists of ATen calls alone, so that it loads without libtorchgraft. Its results are
// the same up to rounding. It is slower, and takes adapter_ids below -1 for the base instead of refusing them.
// `base_forward` stays as it is. Grafting onto the copy makes a module with ops again.
TORCHGRAFT_PATCH_API torch::jit::Module lower(const torch::jit::Module& module, const VerifyOptions& verifying = {});

// Returns the base, with the signature and graph that it had before grafting. Its parameters require no gradients if
// the module has, or had, a trainable adapter: grafting such an adapter freezes the base.
TORCHGRAFT_PATCH_API torch::jit::Module ungraft(const torch::jit::Module& module, const VerifyOptions& verifying = {});

}  // namespace torchgraft
