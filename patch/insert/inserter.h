#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/insert/insert.h>
#include <torchgraft/patch/insert/trained_weights.h>

#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// What insert_lora, insert_prefix and insert_bottleneck share while they write ops into one graph: the values of
// adapter_ids and of the active adapter, the banks of a slot as values, and the calls of ops.
class Inserter {
 public:
  using Graph = torch::jit::Graph;
  using NamedValue = torch::jit::NamedValue;
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  // Adds the input adapter_ids to `graph`. All arguments must outlive the Inserter.
  Inserter(Graph& graph, const GraphSites& sites, const torch::jit::Module& root, const InsertOptions& options);

  // Makes one mask of real tokens per attention mask, before the layer's first projection, so that every op of the
  // layer can read it. For gate_pooling="unpadded" without a token mask input. Call it before any op is inserted.
  void prepare_token_masks(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs,
                           const torch::jit::Module& root);

  // Ops are inserted for `slot` into this layer (an index into the sites' layers) from now on. Errors of their runs
  // name both.
  void enter(const Slot& slot, size_t layer);
  const LayerSites& layer_sites() const { return sites_.layers[layer_]; }
  size_t layer() const { return layer_; }

  Graph& graph() { return graph_; }
  // Those of rows with a plain adapter: rows of a composition count as the base's.
  Value* adapter_ids() const { return adapter_ids_; }
  Value* active() const { return active_; }
  // The node at the top behind which all banks are known.
  Node* top() const { return top_; }
  // Those that forward got, with the ids of compositions.
  Value* all_adapter_ids() const { return all_adapter_ids_; }
  Value* all_active() const { return all_active_; }
  const std::vector<NamedComposition>& compositions() const { return options_.compositions; }
  // The AdapterFusion layers of that name; null when there are none. And a weight at the slot's site.
  const AdapterFusion* find_fusion(const std::string& name) const;
  Value* fusion_weight(const AdapterFusion& fusion, const Slot& slot, const std::string& name);
  // Adds a tensor that was computed from weights to the `adapters` submodule, and returns its value.
  Value* new_buffer(const at::Tensor& tensor);

  // While it lives, what is inserted uses other adapters.
  class Scope {
   public:
    Scope(Inserter& inserter, Value* adapter_ids, Value* active, bool is_composing);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Inserter& inserter_;
    Value* const adapter_ids_;
    Value* const active_;
    const bool is_composing_;
  };
  // Rows of a composition are rows of the adapter that comes first in it. So ReFT and invertible adapters act in the
  // library, whose compositions do not know them.
  Scope first_of_each();
  // All rows use this adapter, whose gates are means over all tokens.
  Scope one_adapter(Value* adapter);
  // The id of the first composition; those of the others follow.
  int64_t first_composition_id() const;
  // Of a pool: the rows that stand for the adapters of each composition, List[List[int]]; else null.
  Value* composition_parts();
  // How many gated ops call() has inserted.
  size_t ops() const { return ops_; }

  Value* slot_module(const Slot& slot);
  // The bank of a parameter; None where the slot has none.
  Value* parameter(const Slot& slot, Value* module, const std::string& name);
  // `value` after the slot's dropout, which acts in training mode.
  Value* dropped(const Slot& slot, Value* value) { return dropped(value, slot.dropout); }
  Value* dropped(Value* value, double p);
  // `value` [B, S, H] without those rows that the slot's stochastic depth drops in training mode.
  Value* rows_dropped(const Slot& slot, Value* value);
  // The real tokens [B, S] of this layer, for rows with ReFT in one of the slots that came to prepare_reft; null where
  // its attention has no mask: all tokens are real.
  Value* real_tokens();
  void prepare_reft(const std::vector<Slot>& slots);
  // A value of the residual stream that was found in the graph, as adapters that replaced it have left it.
  Value* present_stream(Value* found) const;
  void replace_stream(Value* found, Value* by) { streams_[found] = by; }
  // The tokens [B, S], or None for all of them, that gates without a mask of their own are means over; null for all.
  void set_own_tokens(Value* tokens) { own_tokens_ = tokens; }
  // The tokens that the slot's gate is a mean over; null for all tokens, or without a gate.
  Value* token_mask(const Slot& slot);
  // gate_weight and gate_bias.
  std::vector<NamedValue> gate_arguments(const Slot& slot, Value* module);
  // The arguments that every op ends with: gate_weight, gate_bias, adapter_ids, adapter and token_mask.
  std::vector<NamedValue> common_arguments(const Slot& slot, Value* module);

  // Dimensions 0 and 1 of `value` exchanged where `sequence_first` says so.
  Value* swapped(Value* value, bool sequence_first);
  // The node that calls torchgraft::<op> at the graph's insert point.
  Node* call(const char* op, at::ArrayRef<NamedValue> args, at::ArrayRef<NamedValue> named);
  // A node behind `node`: what is inserted before it still reads the present result of `node`. The caller destroys it.
  Node* marker_behind(Node* node);

 private:
  void hide_compositions();
  // The tokens [B, S] that gates are means over: those of `mask`, and all tokens of rows whose adapter pools over all.
  Value* with_whole_rows(Value* mask);
  // An attention mask in which those rows see all tokens.
  Value* readable(Value* mask, Value* x);
  // Throws c10::Error where a mask of this layer's keys does not say which tokens of the pass are real.
  void check_cache(size_t layer) const;
  // The last columns of a mask: those of the keys that this pass adds to the layer's cache.
  Value* of_this_pass(Value* mask, size_t layer);

  Graph& graph_;
  const GraphSites& sites_;
  const InsertOptions& options_;
  // Token masks by attention mask and the block in which they are made.
  std::map<std::pair<const Value*, const torch::jit::Block*>, Value*> shared_masks_;
  std::map<const Value*, Value*> real_tokens_;  // those of real_tokens(), by attention mask
  std::vector<const Slot*> reft_slots_;
  std::map<const Value*, Value*> streams_;  // values of the residual stream, and their replacements
  std::map<size_t, Value*> token_masks_;    // token masks by layer
  size_t ops_ = 0;
  size_t layer_ = 0;
  std::optional<torch::jit::SourceRange> place_;
  Value* adapters_ = nullptr;
  torch::jit::Module adapters_module_;
  size_t buffers_ = 0;  // that new_buffer() has added
  Value* adapter_ids_ = nullptr;
  Node* top_ = nullptr;
  Value* active_ = nullptr;
  Value* all_adapter_ids_ = nullptr;
  Value* all_active_ = nullptr;
  Value* first_adapter_ids_ = nullptr;  // those of first_of_each()
  Value* first_active_ = nullptr;
  bool is_composing_ = false;  // gates are means over all tokens
  Value* input_mask_ = nullptr;
  Value* own_tokens_ = nullptr;
  Value* real_input_ = nullptr;  // the token mask that is an input, as bool
  std::optional<TrainedWeights> trained_;
};

}  // namespace torchgraft
