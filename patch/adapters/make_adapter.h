#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/graft_spec.h>

#include <string>
#include <vector>

namespace torchgraft {

// Throws c10::Error unless `name` is a text without dots that no adapter has.
void check_name(const std::string& name, const std::vector<Adapter>& taken);

// Throws c10::Error for a merged adapter, and for a Compacter without its factors.
void check_can_train(const Adapter& adapter);

// Plans `spec` on `structure` and reads or draws its weights.
Adapter make_adapter(const AdapterSpec& spec, const Structure& structure, const at::TensorOptions& options);

}  // namespace torchgraft
