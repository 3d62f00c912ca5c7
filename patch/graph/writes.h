#pragma once

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// True when the schema of `node` promises a new tensor, but `node` may return its operand: dropout outside of training,
// type_as to the same dtype. AliasDb believes the schema. PyTorch tests the promise for each kernel, so that only
// operators that are composed of others can break it.
bool may_return_operand(const torch::jit::Node* node);

// Values that may share memory, as AliasDb says and by way of nodes that may_return_operand.
class SharedMemory {
 public:
  explicit SharedMemory(const std::shared_ptr<torch::jit::Graph>& graph);

  const torch::jit::AliasDb& aliases() const { return aliases_; }

  // `values`, and the operands and results of nodes that may_return_operand by which others may share their memory.
  torch::jit::ValueSet connected(torch::jit::ValueSet values) const;

 private:
  torch::jit::AliasDb aliases_;
  std::vector<torch::jit::Node*> returning_;  // nodes that may_return_operand
};

// The nodes of a graph that write in place, and what they write into. Describes the graph at construction; not later
// changes.
class Writes {
 public:
  explicit Writes(const std::shared_ptr<torch::jit::Graph>& graph);

  // The first node that runs behind `begin` and before `end` and may write into the memory of one of `values`; null
  // when there is none. `begin` and `end` stand in one block.
  torch::jit::Node* between(const torch::jit::Node* begin, const torch::jit::Node* end,
                            const torch::jit::ValueSet& values) const;

  // Whether anything may write into the memory of the tensor `value`, at whatever time. A pass that reads a value
  // earlier or later than the graph did leaves such values alone. True for values that are newer than this analysis,
  // where the graph has writers.
  bool reach(const torch::jit::Value* value) const;

 private:
  std::vector<torch::jit::Node*> writers_;  // in execution order, those of sub-blocks included
  std::optional<SharedMemory> memory_;      // only where something writes: most graphs need no analysis
  torch::jit::ValueSet untouched_;          // tensors of the graph that no writer may write into
};

// The inputs that `node` writes into: those that its schema names, and running statistics of norms in training, which
// the schema does not name.
std::vector<torch::jit::Value*> written_inputs(const torch::jit::Node* node);

// True when `node` writes into a list or dict that no node of the graph has made: its elements may change.
bool changes_given_container(const torch::jit::Node* node);

// True when `node` writes into one of its inputs.
bool is_writer(const torch::jit::Node* node);

// True when `node` may draw random numbers.
bool draws_random_numbers(const torch::jit::Node* node);

// True for what ends a run with an error, or warns: an effect that nobody waits for.
bool only_complains(const torch::jit::Node* node);

// True when a second run of `node` beside the first would be seen: `node`, or one in its blocks, writes in place, has
// another side effect (errors and warnings are none), or draws random numbers.
bool must_run_once(const torch::jit::Node* node);

// What makes `value`, before it was rearranged: as described(), or "forward's caller".
std::string maker_of(torch::jit::Value* value);

// "aten::masked_fill_ at model.py:12", for errors; without the position when the node has none.
std::string described(const torch::jit::Node* node);

}  // namespace torchgraft
