#pragma once

#include <torchgraft/patch/insert/insert.h>
#include <torchgraft/patch/module/adapter_bank.h>
#include <torchgraft/patch/module/trained_weights.h>

#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// Inside insert_adapters() only: insert.cpp, insert_lora.cpp and insert_bottleneck.cpp.
namespace torchgraft {

// A residual site as it is being rewritten: ops chain on the branch, but each reads the original values.
struct ResidualState {
  ResidualSite site;
  torch::jit::Value* branch = nullptr;      // before any adapter
  torch::jit::Value* sum = nullptr;         // branch + residual, made when an adapter asks for it
  torch::jit::Value* normed_sum = nullptr;  // norm(branch + residual), likewise
  // What the model has behind the norm, or behind the add, with the adapters so far.
  torch::jit::Value* stream = nullptr;
};

class Inserter {
 public:
  using Graph = torch::jit::Graph;
  using NamedValue = torch::jit::NamedValue;
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  Inserter(Graph& graph, const GraphSites& sites, const torch::jit::Module& root, const InsertOptions& options);

  void prepare_token_masks(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs,
                           const torch::jit::Module& root);
  // Inserts the op of `slot` into one run of its layer and returns its gate.
  Value* insert(const Slot& slot, size_t layer);
  size_t ops() const { return ops_; }

 private:
  Value* insert_lora(const Slot& slot, const LinearSite& site);
  void insert_lora_elsewhere(const Slot& slot, Node* linear);
  Value* one_adapter();
  Value* insert_prefix(const Slot& slot, size_t layer);
  Value* insert_bottleneck(const Slot& slot, const ResidualSite& site);
  Value* sum(ResidualState& state);
  Value* normed_sum(ResidualState& state);
  // (output, gate) of a bottleneck on x; x and residual are [B, S, H].
  std::pair<Value*, Value*> bottleneck(const Slot& slot, Value* x, Value* residual);
  Node* call_bottleneck(const Slot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named);
  void replace_stream(ResidualState& state, const Slot& slot, Value* output);
  Value* slot_module(const Slot& slot);
  // The bank of a parameter; None where the slot has none.
  Value* parameter(const Slot& slot, Value* module, const std::string& name);
  // Dropout in training mode.
  Value* dropped(const Slot& slot, Value* value);
  std::vector<NamedValue> gate_arguments(const Slot& slot, Value* module);
  std::vector<NamedValue> common_arguments(const Slot& slot, Value* module);
  Value* token_mask(const Slot& slot);
  Node* marker_behind(Node* node);
  // (output, gate) of a LoRA; x is [B, S, in], base [B, S, out]. `adapter_ids` and `adapter` say whose.
  std::pair<Value*, Value*> lora(const Slot& slot, Value* x, Value* base, Value* adapter_ids, Value* adapter,
                                 Value* token_mask);
  std::pair<Value*, Value*> lora_with_dropout(const Slot& slot, Value* x, Value* base, Value* adapter_ids,
                                              Value* adapter, Value* token_mask);
  Value* swapped(Value* value, bool sequence_first);
  Node* call(const char* op, at::ArrayRef<NamedValue> args, at::ArrayRef<NamedValue> named);

  Graph& graph_;
  const GraphSites& sites_;
  const InsertOptions& options_;
  std::map<const Node*, Value*> projections_;  // by the linear: its result with the adapters so far
  // By the add and the operand that is the branch: parallel blocks may be two operands of one add.
  std::map<std::pair<const Node*, size_t>, ResidualState> residuals_;
  std::map<const Value*, Value*> streams_;       // what has taken the place of a value of the residual stream
  std::map<const Value*, Value*> shared_masks_;  // token masks by attention mask
  std::map<int64_t, Value*> token_masks_;        // and by layer
  size_t ops_ = 0;                               // gated ones, inserted so far
  int64_t layer_ = 0;                            // where the op being inserted goes
  Value* adapters_ = nullptr;
  Value* adapter_ids_ = nullptr;
  Value* active_ = nullptr;
  Value* one_adapter_ = nullptr;  // see one_adapter()
  Value* input_mask_ = nullptr;
  std::optional<TrainedWeights> trained_;
};

}  // namespace torchgraft
