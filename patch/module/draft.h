#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graft_spec.h>
#include <torchgraft/patch/insert/insert.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// A module that is open for a change: a copy of the base, what was found in it, and the adapters that the result gets.
// open_draft() takes a module apart, build() puts it together. Grafting, removing, renaming and merging change
// `adapters` in between, and differ in nothing else.
struct Draft {
  torch::jit::Module module;  // a copy whose forward is the base's
  CanonicalGraph canonical;   // of that forward
  GraphSites sites;           // points into canonical.graph
  GraftOptions options;       // a grafted module keeps those that it was made with
  InsertOptions inserting;
  at::TensorOptions weights;                        // dtype and device of the adapters
  std::vector<Adapter> adapters;                    // at first those that the module has
  std::vector<NamedComposition> compositions;       // likewise
  std::vector<AdapterFusion> fusions;               // likewise
  std::optional<std::vector<c10::IValue>> example;  // arguments of forward, for who gets some to verify with
  std::string head_mask;  // the argument of forward that is the heads' token mask; empty: none
};

// Copies the base of `module`, canonicalises the copy's forward, finds the sites and reads the adapters. Throws
// c10::Error when no attention is found, or when `given` contradicts how the module was grafted.
Draft open_draft(const torch::jit::Module& module, const GraftOptions& given);

// Does the same, for a grafted module only: throws c10::Error, on behalf of the function `what`, when nothing is
// grafted.
Draft open_grafted(const torch::jit::Module& module, const char* what);

// Throws c10::Error, on behalf of graft(), when `name` cannot be the name of a new adapter or composition.
void check_free_name(const Draft& draft, const std::string& name);

// Position of the adapter `name`. Throws c10::Error, on behalf of `what`, which cannot change compositions, when there
// is no such adapter.
size_t find_plain(const Draft& draft, const std::string& name, const char* what);

// Stacks the draft's adapters into banks, inserts the ops, adds the methods and verifies the result. With an empty
// `active` no adapter is active.
torch::jit::Module build(Draft draft, const std::string& active);

// A copy of `module` without anything grafted, in which nothing is optimised.
torch::jit::Module base_copy(const torch::jit::Module& module);

// Each line on a line of its own, indented, for errors that list near misses.
std::string indented(const std::vector<std::string>& lines);

// The token mask for a new head: `wanted`, or the draft's own if that is empty. Throws c10::Error when forward has no
// such argument, or when other heads have another mask.
std::string head_mask(const Draft& draft, const std::string& wanted);

}  // namespace torchgraft
