#pragma once

#include <torchgraft/config/composition_string.h>
#include <torchgraft/patch/adapters/adapter.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// A composition of adapters of the same module. Its id is that of the last adapter plus its position plus one.
struct NamedComposition {
  std::string name;
  Composition tree;
  std::optional<Head> head = std::nullopt;  // of a composition with a Fuse; trained with its AdapterFusion layers
};

// The composition of that name that has a Fuse, and so weights of its own; null where there is none.
const NamedComposition* find_fused(const std::vector<NamedComposition>& compositions, const std::string& name);

// Throws c10::Error, on behalf of `what`, when one of `names` is an adapter that a composition uses.
void check_not_composed(const std::vector<NamedComposition>& compositions, const std::vector<std::string>& names,
                        const char* what);

// Throws c10::Error, on behalf of `what`, when the composition names an adapter that is not there, or one that it
// cannot have: a merged one, and in a composition with a Fuse a trainable one.
void check_parts(const NamedComposition& composition, const std::vector<Adapter>& adapters, const char* what);

// The ids of what rows of each task of a composition with a MultiTask use: one of `adapters`, or a composition of the
// same tree.
// Throws c10::Error, on behalf of `what`, when such a composition is missing.
std::vector<int64_t> ids_of_tasks(const Composition& tree, const std::vector<std::string>& adapters,
                                  const std::vector<NamedComposition>& compositions, const std::string& what);

// The compositions of an `adapters` submodule.
std::vector<NamedComposition> read_compositions(const torch::jit::Module& adapters_module);

// In the error of a Split or BatchSplit that gets inputs of another size.
inline constexpr const char* kOtherSizes = " which is not equal to the sum of ";

// The names of those compositions that split their inputs.
std::set<std::string> splitting_compositions(const torch::jit::Module& adapters_module);

// The names of those compositions that have a MultiTask: no row runs them, but one of their tasks.
std::set<std::string> task_compositions(const torch::jit::Module& adapters_module);

// The names of the adapters and of the compositions of an `adapters` submodule, in the order of their ids.
std::vector<std::string> names_by_id(const torch::jit::Module& adapters_module);

// Adds what a module with compositions has besides: their names and trees, and the names and configs by id.
// insert_adapters() fills the lists of their gates (set_composed_gates).
void register_compositions(torch::jit::Module& adapters_module, const std::vector<Adapter>& adapters,
                           const std::vector<NamedComposition>& compositions);

// Of a pool's module: for each composition the rows that its adapters stand for, List[List[int]]. Whoever writes an
// element makes sure that nobody runs rows of the composition.
inline constexpr const char* kCompositionParts = "composition_parts";
void register_composition_parts(torch::jit::Module& adapters_module, const std::vector<NamedComposition>& compositions);

// A gate that grafted_forward returns behind those of the slots: of an adapter within a composition.
struct ComposedGate {
  int64_t layer = 0;  // Layer::number
  std::string location;
  size_t key = 0;  // position in composed_keys, of "<composition>.<adapter>"
};
void set_composed_gates(torch::jit::Module& adapters_module, const std::vector<ComposedGate>& gates);

// The methods that an `adapters` submodule with compositions has beside those of adapters_module.cpp.
extern const char* const kComposedMethods;

}  // namespace torchgraft
