#pragma once

#include <torchgraft/config/composition.h>
#include <torchgraft/patch/graft_spec.h>
#include <torchgraft/plan/safetensors.h>

#include <cstdint>
#include <string>

namespace torchgraft {

// Reads the directory of an adapter, as save_adapter() and AdapterHub write it; Python alone reads a
// pytorch_adapter.bin. An empty `name` keeps the adapter's own. Leaves out a head of a kind that HeadConfig does not
// have. Trusts no file: reads regular files only, configurations of at most 1 MiB and weights of at most
// `most_weight_bytes`. Another process may save into the directory meanwhile: what is returned is one whole version.
// Throws c10::Error when a file is missing or damaged.
TORCHGRAFT_PATCH_API AdapterSpec read_adapter_directory(const std::string& directory, const std::string& name = "",
                                                        uint64_t most_weight_bytes = kMostWeightBytes);

// Returns the configuration, and throws as read_adapter_directory does, but reads no weights: of their files the
// headers alone, which tell whether the file is whole.
TORCHGRAFT_PATCH_API AdapterConfig check_adapter_directory(const std::string& directory,
                                                           uint64_t most_weight_bytes = kMostWeightBytes);

// Whether an adapter's configuration, a regular file, lies in the directory. While another process saves into it, waits
// for the instant of renaming to pass, but not for long.
TORCHGRAFT_PATCH_API bool is_adapter_directory(const std::string& directory);

// Whether the directory has an adapter_setup.json: a composition (save_adapter_setup() in Python). No adapter is read
// from it, but its adapters have directories of their own in it.
TORCHGRAFT_PATCH_API bool is_setup_directory(const std::string& directory);

// The composition of such a directory, its weights divided by their sums as the adapters library does. Throws
// c10::Error when the file is missing or damaged, and for heads of its own, which a composition with a Fuse has.
TORCHGRAFT_PATCH_API Composition read_adapter_setup(const std::string& directory);

// Reads the configuration alone. Throws as read_adapter_directory does.
TORCHGRAFT_PATCH_API AdapterConfig read_adapter_config(const std::string& directory);

}  // namespace torchgraft
