#pragma once

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/insert/insert.h>
#include <torchgraft/patch/module/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// Everything that is known before the banks are stacked: between lay_foundation() and build(), `adapters` is what there
// is to change. Adding, removing and renaming adapters differ in nothing else.
struct Foundation {
  torch::jit::Module module;  // a copy whose forward is the base's
  CanonicalGraph canonical;   // of that forward
  GraphSites sites;           // points into canonical.graph
  GraftOptions options;       // of a grafted module: those that it was made with
  InsertOptions inserting;
  at::TensorOptions weights;      // dtype and device of the adapters
  std::vector<Adapter> adapters;  // those of a grafted module
  std::string head_mask;          // the argument of forward that heads take for their token mask; empty: none
};

// The token mask that heads get: `wanted`, or what it was if that is empty. Throws c10::Error when there is no such
// argument, or when other heads have another.
std::string head_mask(const Foundation& foundation, const std::string& wanted);

// Clones `module`, takes off what is grafted, canonicalises and finds the sites. Throws c10::Error when there are none,
// or when `given` contradicts how the module was grafted.
Foundation lay_foundation(const torch::jit::Module& module, const GraftOptions& given);

// Throws c10::Error, on behalf of the function `what`, when nothing is grafted onto `module`.
void check_grafted(const torch::jit::Module& module, const char* what);

// A grafted module, opened for a change.
Foundation open_grafted(const torch::jit::Module& module, const char* what);

// Stacks the foundation's adapters into banks, inserts the ops and adds the methods. `active` empty: none is active.
torch::jit::Module build(Foundation foundation, const std::string& active);

// The active adapter of a grafted module; empty when there is none.
std::string active_name(const torch::jit::Module& grafted);

// A copy of `module` without anything grafted.
torch::jit::Module base_copy(const torch::jit::Module& module);

// Throws c10::Error unless `name` is an identifier that no adapter has.
void check_name(const std::string& name, const std::vector<Adapter>& taken);

// Throws c10::Error when the adapter cannot be trained.
void check_can_train(const Adapter& adapter);

// Plans `spec` on `structure` and reads or draws its weights.
Adapter make_adapter(const AdapterSpec& spec, const Structure& structure, const at::TensorOptions& options);

GraphSites places(const CanonicalGraph& canonical, const torch::jit::Module& module,
                  const std::optional<Structure>& wanted);

// The sites that a grafted module was made with; nullopt when they were detected.
std::optional<Structure> remembered_sites(const torch::jit::Module& grafted);

}  // namespace torchgraft
