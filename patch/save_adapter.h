#pragma once

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/read_adapter.h>
#include <torchgraft/plan/safetensors.h>

#include <string>
#include <vector>

namespace torchgraft {

// One adapter as AdapterHub keeps it in a directory: the text of adapter_config.json, and the state dict beside it.
struct AdapterFiles {
  std::string config;
  StateDict weights;
  std::string head_config;  // the text of head_config.json; empty when the adapter has no head
  StateDict head_weights;
};

// The adapter `name` of a grafted module, as `model.save_adapter()` of adapters==1.3.0 would write it: the library's
// load_adapter() then gives the same outputs on the same model. Prefixes of a frozen adapter become flat ones, because
// their MLP is gone. The library loads a head only if its file names the right `model_class` ("BertAdapterModel").
// Throws c10::Error when nothing is grafted onto the module, or no adapter has that name.
TORCHGRAFT_PATCH_API AdapterFiles adapter_files(const torch::jit::Module& module, const std::string& name,
                                                const std::string& model_class = "");

// The head alone, of a composition; empty when it has none.
TORCHGRAFT_PATCH_API AdapterFiles composition_head_files(const torch::jit::Module& module, const std::string& name,
                                                         const std::string& model_class = "");

// Writes these files: adapter_config.json and adapter.safetensors, and for a head head_config.json and
// model_head.safetensors. Writes all of them or, when it throws, none. Removes other files of an earlier adapter, and
// those that the library would read instead. Makes the directory if need be. A process that is killed meanwhile leaves
// the old adapter, the new one or, for the instant of renaming, no adapter_config.json. Throws c10::Error when the
// directory holds an adapter of another name, or files that an adapter replaces and no adapter_config.json that says
// whose they are, unless `overwrite` says that they may go.
TORCHGRAFT_PATCH_API void save_adapter(const torch::jit::Module& module, const std::string& name,
                                       const std::string& directory, const std::string& model_class = "",
                                       bool overwrite = false);

// Throws c10::Error when `directory` holds another adapter than `name`: an adapter_config.json that does not say so, or
// files of an adapter without one.
TORCHGRAFT_PATCH_API void check_replaces(const std::string& directory, const std::string& name);

// Returns a copy of `module`, grafted or not, to which the directory's adapter is added, or in which it replaces the
// adapter of that name. The active adapter stays active; if nothing was grafted, the loaded one is active. `module`
// stays as it is: a server loads beside its traffic and swaps the copy in. Throws c10::Error when a file is damaged or
// does not fit.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter(const torch::jit::Module& module, const std::string& directory,
                                                     const std::string& name = "");

// The same for a spec.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

// Lists which parameter of `module` each key of the spec's weights would go to. Throws c10::Error where load_adapter
// would: at a key that fits no parameter, and at a shape that does not fit.
TORCHGRAFT_PATCH_API std::vector<WeightMatch> match_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

}  // namespace torchgraft
