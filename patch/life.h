#pragma once

#include <torchgraft/patch/graft.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// What can be done with the adapters of a grafted module. Each function returns a copy and leaves `module` as it is, so
// that threads that run it are not disturbed: swap the copy in when it is ready. The copy shares the memory of the
// base's weights with `module` (clone_module.h); the banks are new. The active adapter stays active where it still is.
// All throw c10::Error when `module` is not grafted, and when a name is unknown (listing the known ones) or taken.

struct AdapterInfo {
  std::string name;
  std::string config;  // JSON, as adapter_config(name) gives it
  bool active = false;
  bool merged = false;                         // see merge_adapter
  bool trainable = false;                      // see train.h
  int64_t parameters = 0;                      // trained numbers, the head's too, without the padding of its bank
  int64_t bytes = 0;                           // of them
  std::map<std::string, int64_t> by_location;  // parameters by the oracle's location ("output_adapter"), or "head"
};

// In the order of adapter_names(), which adapter_ids count.
TORCHGRAFT_PATCH_API std::vector<AdapterInfo> list_adapters(const torch::jit::Module& module);

// Later adapters move up: their adapter_ids change. The last adapter cannot be removed (see ungraft), nor a merged one.
TORCHGRAFT_PATCH_API torch::jit::Module remove_adapters(const torch::jit::Module& module,
                                                        const std::vector<std::string>& names);

TORCHGRAFT_PATCH_API torch::jit::Module rename_adapter(const torch::jit::Module& module, const std::string& name,
                                                       const std::string& new_name);

// The adapter `spec.name` gets another configuration and other weights, and the head of `spec`, or none; its place
// among adapter_names() stays.
TORCHGRAFT_PATCH_API torch::jit::Module replace_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

// Adds `name`, whose every parameter is sum_i weights[i] * parameter of names[i]. Empty weights: all the same. With
// `normalise` they are divided by their sum. The configurations must be equal up to how weights are initialised.
// As average_adapter(combine_strategy="linear") of the adapters library, but that prefixes are averaged as keys and
// values, not as the weights of their MLP, and Compacter's projections, not their factors. The average is frozen, and
// has no head: heads are of different tasks.
TORCHGRAFT_PATCH_API torch::jit::Module average_adapters(const torch::jit::Module& module, const std::string& name,
                                                         const std::vector<std::string>& names,
                                                         const std::vector<double>& weights = {},
                                                         bool normalise = true);

// Adds alpha / r B A of an ungated LoRA to the weights that it updates, so that it costs nothing: every adapter, and
// the base, then run on the merged weights. The adapter stays in its bank without effect, for unmerge_adapter. Weights
// are copied, not written to. ungraft() of the result is the plain merged model. Throws c10::Error when the adapter has
// a gate, a bottleneck or a prefix, which no weight of the base can hold, and when a weight that it updates is a
// constant of the graph (a frozen module).
TORCHGRAFT_PATCH_API torch::jit::Module merge_adapter(const torch::jit::Module& module, const std::string& name);

// Takes it out of the weights again (up to rounding: the sum is taken in float64).
TORCHGRAFT_PATCH_API torch::jit::Module unmerge_adapter(const torch::jit::Module& module, const std::string& name);

// A copy whose forward consists of ATen calls alone, so that it loads where libtorchgraft cannot be. Results are the
// same up to rounding; it is slower, wrong adapter_ids below -1 are taken for the base, and `base_forward` is as it
// was. What is grafted onto it later is made of ops again.
TORCHGRAFT_PATCH_API torch::jit::Module lower(const torch::jit::Module& module);

// The base, with the signature and the graph that it had before it was grafted. Its parameters require no gradients
// when the module has, or had, a trainable adapter: grafting that froze them.
TORCHGRAFT_PATCH_API torch::jit::Module ungraft(const torch::jit::Module& module);

}  // namespace torchgraft
