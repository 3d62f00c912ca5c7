#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <string>

namespace torchgraft {

// Checks that `saved`, its configuration, and a state dict of `adapter`, named `name` in it, would give the adapter
// again on the module that it is saved from. Names of modules on the way to the layers may be those of the library
// ("attention"), and a list around the layers may have numbers of its own. Throws c10::Error, on behalf of
// save_adapter, that says what would go wrong.
void check_reads_back(const Adapter& adapter, const AdapterConfig& saved, const StateDict& state,
                      const Structure& structure, const std::string& name);

}  // namespace torchgraft
