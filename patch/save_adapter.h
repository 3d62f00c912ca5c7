#pragma once

#include <torchgraft/patch/graft.h>

#include <string>
#include <vector>

namespace torchgraft {

// One adapter as AdapterHub keeps it in a directory: the text of adapter_config.json and the state dict beside it.
struct AdapterFiles {
  std::string config;
  StateDict weights;
  std::string head_config;  // the text of head_config.json; empty when the adapter has no head
  StateDict head_weights;
};

// The adapter `name` of a grafted module, as `model.save_adapter()` of adapters==1.3.0 writes it: its load_adapter()
// gives the same outputs on the same model. Prefixes of a frozen adapter are flat ones there, for their MLP is no
// longer known. `model_class` ("BertAdapterModel") is what the library wants to read in a head's file before it takes
// it. Throws c10::Error when the module is not grafted or has no such adapter.
TORCHGRAFT_PATCH_API AdapterFiles adapter_files(const torch::jit::Module& module, const std::string& name,
                                                const std::string& model_class = "");

// Writes them: adapter_config.json and adapter.safetensors, of a head head_config.json and model_head.safetensors, all
// or, when something throws, none; what else an adapter may have there, of the one before it or for the library to read
// instead, is removed. The directory is made when it is missing. Killed in between, it has the old adapter, the new
// one, or (for an instant, of renaming) no adapter_config.json.
TORCHGRAFT_PATCH_API void save_adapter(const torch::jit::Module& module, const std::string& name,
                                       const std::string& directory, const std::string& model_class = "");

// Reads the same files (pytorch_adapter.bin: from Python). `name` empty: its own. A head of another kind than
// HeadConfig's is left out. Throws c10::Error when a file is missing or damaged.
TORCHGRAFT_PATCH_API AdapterSpec read_adapter_directory(const std::string& directory, const std::string& name = "");

// A copy of `module`, grafted or not, with the adapter of the directory in place of one of that name, or added to those
// that it has; the active one stays active, of a bare module the loaded one is. Nothing of `module` changes: a server
// loads beside its traffic and swaps the copy in. Throws c10::Error when a file is damaged or does not fit.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter(const torch::jit::Module& module, const std::string& directory,
                                                     const std::string& name = "");

// The same for a spec.
TORCHGRAFT_PATCH_API torch::jit::Module load_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

// What load_adapter would match to what: keys of the spec's weights, and their places in `module`. Throws c10::Error
// where load_adapter would, at a key without a place, or a shape that does not fit.
TORCHGRAFT_PATCH_API std::vector<WeightMatch> match_adapter(const torch::jit::Module& module, const AdapterSpec& spec);

}  // namespace torchgraft
