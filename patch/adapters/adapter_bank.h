#pragma once

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/patch/adapters/bottleneck_form.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// The weights that one trainable adapter has in a slot, instead of a row of the bank.
struct OwnWeights {
  size_t adapter = 0;
  std::string name;  // of the adapter
  PlannedModule module;
  std::map<std::string, std::vector<int64_t>> computed = {};  // shapes of computed_weights
  std::map<std::string, at::Tensor> parameters = {};          // shapes as in plan/adapter_weights.h
};

// A site together with a way of computing, and the banks of the adapters that have it. Adapters share a slot when they
// differ in parameters only; bottlenecks, when they have one form. A slot is one op in the graph for each run of its
// layer.
struct Slot {
  int64_t layer = 0;         // Layer::index: the attention where it runs first
  int64_t number = 0;        // Layer::number: of the Transformer layer
  std::string location;      // "selfattn_lora"
  std::string site;          // "selfattn_lora_q"
  std::string name;          // also of the slot's submodule: "selfattn_lora_q", "output_adapter_seq_ln_relu"
  BottleneckForm form = {};  // of bottlenecks; an invertible adapter has its non_linearity here
  LoRAForm lora = LoRAForm::kAdd;
  bool inverts_output = false;     // of an invertible adapter
  std::string non_linearity = {};  // of ReFT
  // Banks [N, ...] of the parameters in plan/adapter_weights.h; also prefix_length [N], and present, bool [N].
  std::map<std::string, at::Tensor> parameters = {};
  std::vector<int64_t> gates = {};  // by adapter: how many gates it has in this slot; 0 also when it is not in the slot
  double dropout = 0.0;             // above 0 only in a slot that one trainable adapter has for itself
  double stochastic_depth = 0.0;    // likewise, of a bottleneck
  std::vector<OwnWeights> own = {};

  // Whether a row of the bank `parameter` is read: not when the only adapter has the parameter for itself.
  bool has_bank(const std::string& parameter) const;
};

// Whether a parameter of a bank is trained. A scaling is not: it is alpha / r, or a number of the config. A
// bottleneck's scaling "learned" or "channel" is (BottleneckForm::scaling_is_trained).
bool is_trained(const std::string& parameter, bool scaling_is_trained);

// The same for one adapter: Compacter without phm_bias has no biases.
bool is_trained(const std::string& parameter, const PlannedModule& module);

// The weights of `module` that a trainable adapter computes in every pass: those made of its `sources`, and the norms
// of DoRA, which follow from the LoRA and the base's weight.
std::set<std::string> computed_weights(const Adapter& adapter, const PlannedModule& module);

// Whether all modules of the adapter in slots of this kind have one lora_a: VeRA's. Their banks are one tensor.
bool shares_lora_a(const PlannedModule& module);

// The slot of a planned module: "selfattn_lora_q", "output_adapter_seq_ln_relu".
std::string slot_name(const PlannedModule& module);

// The same for a module of `adapter`, which has a slot for itself when it is trained with dropout.
std::string slot_name(const Adapter& adapter, const PlannedModule& module);

// Whether one number of an adapter fills a whole row of its bank along `dim`: one gate for keys and values, one scale
// for all channels, one unit of ReFT for the first and the last positions.
bool broadcasts(const std::string& parameter, int64_t dim);

// The number that a bank holds for an adapter without the parameter.
double missing_value(const std::string& parameter);

// Copies a parameter into its row of a bank. The row may be larger (ranks, prefix lengths); the rest stays as it is.
void write_parameter(at::Tensor row, const std::string& parameter, const at::Tensor& value);

// The bank [count, ...] of a parameter, of (row, value): every dimension is as large as the largest value's, zeros pad.
// Rows without a value are zero, those of DoRA's norms 1.
at::Tensor stack_rows(const std::string& parameter, const std::vector<std::pair<size_t, at::Tensor>>& rows,
                      size_t count);

// Stacks adapters into banks, in execution order. Ranks and prefix lengths are padded with zeros. In a slot with gates
// an adapter without a gate has gate_weight 0 and gate_bias +inf (a gate of exactly 1). An adapter that is not in a
// slot has scaling 0 (or prefix_length 0) there. Trainable adapters have OwnWeights.
std::vector<Slot> stack_banks(const std::vector<Adapter>& adapters);

// One op in the graph: a slot in one run of its layer. A layer that runs many times has one set of slots.
struct SlotRun {
  size_t slot = 0;   // index into the slots
  size_t layer = 0;  // index into the structure's layers
};

// All runs of `slots` on `structure`, in execution order.
std::vector<SlotRun> slot_runs(const std::vector<Slot>& slots, const Structure& structure);

// Whether the op of a slot returns a gate; and the runs of such slots. grafted_forward returns its gates in this order.
bool has_gate(const Slot& slot);

// Whether the slot holds tokens among the embeddings.
bool is_prompt(const Slot& slot);
std::vector<SlotRun> gated_runs(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs);

}  // namespace torchgraft
