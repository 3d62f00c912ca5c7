#pragma once

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// The nodes of a graph that write in place, and what they write into. Describes the graph at construction; not later
// changes.
class Writes {
 public:
  explicit Writes(const std::shared_ptr<torch::jit::Graph>& graph);

  // The first node that runs behind `begin` and before `end` and may write into the memory of one of `values`; null
  // when there is none. `begin` and `end` stand in one block.
  torch::jit::Node* between(const torch::jit::Node* begin, const torch::jit::Node* end,
                            const torch::jit::ValueSet& values) const;

 private:
  std::vector<torch::jit::Node*> writers_;      // in execution order, those of sub-blocks included
  std::optional<torch::jit::AliasDb> aliases_;  // only where something writes: most graphs need no analysis
};

// True when the schema of `node` says that it writes into one of its inputs.
bool is_writer(const torch::jit::Node* node);

// "aten::masked_fill_ at model.py:12", for errors; without the position when the node has none.
std::string described(const torch::jit::Node* node);

}  // namespace torchgraft
