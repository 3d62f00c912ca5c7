#pragma once

#include <torchgraft/config/head_config.h>
#include <torchgraft/patch/insert/bottleneck_form.h>
#include <torchgraft/plan/adapter_weights.h>
#include <torchgraft/plan/plan.h>

#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <set>
#include <string>
#include <vector>

namespace torchgraft {

struct Head {
  HeadConfig config;
  ModuleWeights weights;  // see plan/head_weights.h
};

// One named adapter with its weights, one entry per module of its plan.
struct Adapter {
  std::string name;
  AdapterConfig config;
  Plan plan = {};
  AdapterWeights weights = {};
  bool merged = false;             // a LoRA that the base's weights hold: its scaling is 0
  bool trainable = false;          // has parameters of its own instead of rows of the banks
  Reparametrisation sources = {};  // of a trainable one: what `weights` are computed from
  std::optional<Head> head = std::nullopt;
};

// A trainable adapter's submodule of a slot, or of the container of what weights are computed from at a place of a
// Reparametrisation: "self_prefix_source", "layer_0_output_adapter_source".
std::string own_module_name(const std::string& adapter);
constexpr const char* kSourceSuffix = "_source";

// Position of `name` among `adapters`; throws c10::Error that lists the names, on behalf of the function `what`.
size_t find_adapter(const std::vector<Adapter>& adapters, const std::string& name, const char* what);

// The same among the names of an `adapters` submodule.
size_t check_known(const torch::jit::Module& adapters_module, const std::string& name, const char* what);

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
struct BankSlot {
  int64_t layer = 0;         // Layer::index: the attention where it runs first
  int64_t number = 0;        // Layer::number: of the Transformer layer
  std::string location;      // the oracle's key, e.g. "selfattn_lora"
  std::string slot;          // "selfattn_lora_q"
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

// Stacks adapters into banks, in execution order. Ranks and prefix lengths are padded with zeros; an adapter without a
// gate in a gated bank has gate_weight 0 and gate_bias +inf (a gate of exactly 1); an adapter that is not at a place
// has scaling 0 (or prefix_length 0) there. Trainable adapters have OwnWeights.
std::vector<BankSlot> stack_banks(const std::vector<Adapter>& adapters);

// One op in the graph: a slot in one run of its layer. A layer whose weights run many times has one set of slots.
struct SlotRun {
  size_t slot = 0;   // index into the slots
  size_t layer = 0;  // index into the structure's layers
};

// All ops that `slots` make on `structure`, in execution order; the gates that grafted_forward returns are in this
// order.
std::vector<SlotRun> slot_runs(const std::vector<BankSlot>& slots, const Structure& structure);

// The `adapters` submodule: layer_<i>.<slot name>.<parameter>, for trainable adapters
// layer_<i>.<slot name>.adapter_<name>.<parameter> and <place>_source.adapter_<name>.<parameter>; the adapters' names
// and configs, and the methods behind activate() and forward_with_gates(). `unit` is the compilation unit of the module
// that it will belong to.
torch::jit::Module make_adapters_module(const std::vector<Adapter>& adapters, const std::vector<BankSlot>& slots,
                                        const std::vector<SlotRun>& runs,
                                        const std::shared_ptr<torch::jit::CompilationUnit>& unit);

// The weights of one adapter, cut out of the banks: one entry per module of its plan.
AdapterWeights read_row(const torch::jit::Module& adapters_module, size_t row, const Plan& plan);

// The adapters of a grafted module's `adapters` submodule, unstacked.
std::vector<Adapter> read_adapters(const torch::jit::Module& adapters_module, const Structure& structure);

}  // namespace torchgraft
