#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/adapters/compositions.h>

#include <functional>
#include <string>
#include <vector>

namespace torchgraft {

// What the graph of a composition depends on. Compositions of one shape differ in the rows of their adapters only.
struct PoolShape {
  std::string tree;                  // as text; its adapters are called "0", "1", ... in the order of adapters_in
  std::vector<std::string> forms;    // of each adapter: form_of
  std::vector<AdapterConfig> parts;  // of each adapter: one with that form

  bool operator==(const PoolShape& other) const { return tree == other.tree && forms == other.forms; }
};

// What a composition's graph depends on in an adapter: its configuration without what only sizes and numbers in banks
// follow from, and its slots.
std::string form_of(const Adapter& adapter);

// The tree of a shape.
std::string shape_tree(const Composition& tree);

// Draft::adapters for these shapes, behind those of `adapters`, and Draft::compositions. `make` makes an adapter of a
// name and a configuration. Shapes share adapters; within one shape each adapter has its own.
void add_shapes(const std::vector<PoolShape>& shapes, std::vector<Adapter>& adapters,
                std::vector<NamedComposition>& compositions,
                const std::function<Adapter(const std::string& name, const AdapterConfig& config)>& make);

}  // namespace torchgraft
