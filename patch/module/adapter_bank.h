#pragma once

#include <torchgraft/patch/insert/bottleneck_form.h>
#include <torchgraft/patch/module/adapter.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// What one trainable adapter has at a slot instead of a row of the bank.
struct OwnWeights {
  size_t adapter = 0;
  std::string name;  // of the adapter
  PlannedModule module;
  std::map<std::string, std::vector<int64_t>> computed = {};  // shapes of computed_weights
  std::map<std::string, at::Tensor> parameters = {};          // shapes as in plan/adapter_weights.h
};

// One op to insert: a place, and the parameters of all adapters there, stacked. Adapters of one place share an op when
// their computation differs in parameters only (for bottlenecks: those of one form).
struct Slot {
  int64_t layer = 0;         // Layer::index: the attention where it runs first
  int64_t number = 0;        // Layer::number: of the Transformer layer
  std::string location;      // the oracle's key, e.g. "selfattn_lora"
  std::string site;          // "selfattn_lora_q"
  std::string name;          // the slot's module name: "selfattn_lora_q", "output_adapter_seq_ln_relu"
  BottleneckForm form = {};  // of bottlenecks
  LoRAForm lora = LoRAForm::kAdd;
  std::map<std::string, at::Tensor> parameters =
      {};                           // [N, ...], see plan/adapter_weights.h; prefix_length [N]; present, bool [N]
  std::vector<int64_t> gates = {};  // per adapter: how many gates it has here; 0 = not gated, or not here
  double dropout = 0.0;             // of the one trainable adapter that then has the slot for itself
  std::vector<OwnWeights> own = {};

  // Whether some adapter has a row of the bank `parameter`, whose rows of trainable adapters are not read.
  bool has_bank(const std::string& parameter) const;
};

// Whether a parameter of a bank is learned. A scaling is alpha / r, or a number of the config, unless it is a
// bottleneck's "learned" or "channel" (BottleneckForm::scaling_is_trained).
bool is_trained(const std::string& parameter, bool scaling_is_trained);

// The same for one adapter: Compacter without phm_bias has no biases.
bool is_trained(const std::string& parameter, const PlannedModule& module);

// The weights of `module` that a trainable adapter computes in every pass: those that `sources` make, and the norms of
// DoRA, which follow from the LoRA and the base's weight.
std::set<std::string> computed_weights(const Adapter& adapter, const PlannedModule& module);

// The module of a layer that holds the bank of a planned module: "selfattn_lora_q", "output_adapter_seq_ln_relu".
std::string slot_name(const PlannedModule& module);

// The same for `adapter`, which has a slot for itself where it is trained with dropout.
std::string slot_name(const Adapter& adapter, const PlannedModule& module);

// Whether one number of an adapter stands for all in that dimension of its bank: one gate for keys and values, one
// scale for all channels.
bool broadcasts(const std::string& parameter, int64_t dim);

// What a bank holds for an adapter that lacks a parameter.
double missing_value(const std::string& parameter);

// Copies a parameter into the row of a bank, which may be larger (ranks, prefix lengths); what is over stays as it is.
void write_parameter(at::Tensor row, const std::string& parameter, const at::Tensor& value);

// The bank [count, ...] of a parameter, of (row, value): every dimension is as large as the largest value's, zeros pad.
// Rows without a value are zero.
at::Tensor stack_rows(const std::string& parameter, const std::vector<std::pair<size_t, at::Tensor>>& rows,
                      size_t count);

// Stacks adapters into banks, in execution order. Ranks and prefix lengths are padded with zeros; an adapter without a
// gate in a gated bank has gate_weight 0 and gate_bias +inf (a gate of exactly 1); an adapter that is not at a place
// has scaling 0 (or prefix_length 0) there. Trainable adapters have OwnWeights.
std::vector<Slot> stack_banks(const std::vector<Adapter>& adapters);

// One op in the graph: a slot in one run of its layer. A layer whose weights run many times has one set of slots.
struct SlotRun {
  size_t slot = 0;   // index into the slots
  size_t layer = 0;  // index into the structure's layers
};

// All ops that `slots` make on `structure`, in execution order; the gates that grafted_forward returns are in this
// order.
std::vector<SlotRun> slot_runs(const std::vector<Slot>& slots, const Structure& structure);

}  // namespace torchgraft
