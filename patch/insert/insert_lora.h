#pragma once

#include <torchgraft/patch/insert/inserter.h>
#include <torchgraft/patch/insert/join_parts.h>

#include <functional>
#include <map>
#include <utility>

namespace torchgraft {

// Adds LoRAs to projections. Ops on one packed projection follow each other.
class LoraInserter {
 public:
  explicit LoraInserter(Inserter& inserter) : inserter_(inserter), graph_(inserter.graph()) {}

  // Adds the LoRA of `slot` to `site`, and to the linear maps elsewhere that have the same weight. Returns the gate.
  torch::jit::Value* operator()(const Slot& slot, const LinearSite& site);

  // Puts what `make` gives, of x [B, S, in] and the result so far [B, S, out], in place of that result.
  void replace(const LinearSite& site,
               const std::function<torch::jit::Value*(torch::jit::Value* x, torch::jit::Value* base)>& make);

  // Copies each packed projection once for all of its LoRAs. Call it when all are inserted.
  void join_packed_parts();

 private:
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  Value* insert(const Slot& slot, const LinearSite& site);
  // Adds the same LoRA to a linear map with the same weight on [1, P, features]; its gate is pooled over the P
  // positions.
  void insert_elsewhere(const Slot& slot, Node* linear);
  // The adapter that all rows have, computed at the graph's top: a value that rows share can have only one.
  Value* one_adapter();
  // (output, gate) of a LoRA; x is [B, S, in], base [B, S, out]. `adapter_ids` and `adapter` choose the adapters.
  std::pair<Value*, Value*> lora(const Slot& slot, Value* x, Value* base, Value* adapter_ids, Value* adapter,
                                 Value* token_mask);
  // The same of a table's rows: tokens are int64 [B, S].
  std::pair<Value*, Value*> lookup(const Slot& slot, Value* tokens, Value* base);
  // The same where the update reads `x` after dropout; the gate reads `x` itself.
  std::pair<Value*, Value*> lora_with_dropout(const Slot& slot, Value* x, Value* base, Value* adapter_ids,
                                              Value* adapter, Value* token_mask);

  Inserter& inserter_;
  torch::jit::Graph& graph_;
  std::map<const Node*, Value*> projections_;  // results of linear maps with the adapters so far
  std::map<const Node*, PackedParts> packed_;  // by linear map
  Value* one_adapter_ = nullptr;
};

}  // namespace torchgraft
