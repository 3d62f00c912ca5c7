#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/graft_spec.h>

#include <string>
#include <vector>

namespace torchgraft {

// Throws c10::Error unless `name` is a text without dots that no adapter has.
void check_name(const std::string& name, const std::vector<Adapter>& taken);

// Throws c10::Error for a merged adapter, for a Compacter without its factors, and for an orthogonal ReFT in 16 bits.
void check_can_train(const Adapter& adapter);

// Gives an adapter that was frozen what its orthogonal projections (ReFT) are computed from: others that give the same.
void restore_reft_sources(Adapter& adapter);

// Gives `spec` the gate_pooling that the user wants; an empty `wanted` leaves the spec's own. A TORCH_WARN, on behalf
// of `what`, names a trained adapter that had another one. Throws c10::Error when `wanted` is unknown.
void set_gate_pooling(AdapterSpec& spec, const std::string& wanted, const char* what);

// Throws c10::Error when prefixes of `spec` were made for another number of heads than `plan` has.
void check_prefix_heads(const AdapterSpec& spec, const Plan& plan);

// Plans `spec` on `structure` and reads or draws its weights.
Adapter make_adapter(const AdapterSpec& spec, const Structure& structure, const at::TensorOptions& options);

}  // namespace torchgraft
