#pragma once

#include <torchgraft/config/composition_string.h>
#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/insert/inserter.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// What one adapter has at a site.
struct ComposedPart {
  size_t adapter = 0;
  const Slot* slot = nullptr;
  const PlannedModule* module = nullptr;
  const ModuleWeights* weights = nullptr;
  bool trainable = false;
  torch::jit::Value* row = nullptr;  // of a pool: the row that it stands for
  size_t key = 0;                    // position in composed_keys
};

// What a composition acts on at one site.
struct ComposedSite {
  std::string name;                           // of the composition
  std::string place;                          // "output_adapter of layer 3", for errors
  std::map<std::string, ComposedPart> parts;  // by the adapter's name: those that have something here
};

// The states of the library's layers (BottleneckState, LoRAState, PrefixTuningState), as values of the graph. Rows are
// those of the composition.
struct ComposedState {
  using Value = torch::jit::Value;
  Value* hidden = nullptr;    // bottleneck: hidden_states; LoRA: hidden_states or none; prefix: its keys so far or none
  Value* input = nullptr;     // bottleneck: input_tensor; LoRA: layer_input; prefix: residual_input
  Value* residual = nullptr;  // bottleneck: adapter_residual; LoRA: layer_output; prefix: its values so far or none
  std::optional<ComposedPart> last = std::nullopt;
  bool is_branch = false;  // bottleneck: `hidden` is the branch as the model computes it
  bool has_up = false;     // bottleneck: the library's bottleneck_up is there
  int64_t tokens = 0;      // prefix: the length of its keys; LoRA: 1 for a vector that (IA)^3 has made for all tokens
  int64_t first_rows = 0;  // behind a BatchSplit: of its first part; of nested ones, of the innermost first part
  int64_t split_rows = 0;  // behind a BatchSplit: of all of its parts; else 0
  bool is_behind_parallel = false;  // which has more than one child
};

// Evaluates a composition at one site as ComposableAdapterLayerBase of the adapters library does, block by block. What
// a method does with a block is up to the derived classes. Throws c10::Error where the library refuses.
class Composer {
 public:
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  struct Gate {
    ComposedPart part;
    Value* value = nullptr;  // [rows, gates]
  };

  Composer(Inserter& inserter, const ComposedSite& site) : inserter_(inserter), graph_(inserter.graph()), site_(site) {}
  virtual ~Composer() = default;

  ComposedState compose(const Composition& tree, const ComposedState& state);
  const std::vector<Gate>& gates() const { return gates_; }

 protected:
  // The adapter `part` on `state`: compose_single.
  virtual ComposedState single(const ComposedPart& part, ComposedState state) = 0;
  // What comes before the first adapter of `block`, which may be an adapter.
  virtual ComposedState pre_block(const Composition& block, ComposedState state);
  // The weighted sum of the children's results. `shares` are the factors.
  virtual ComposedState mean(const std::vector<ComposedState>& states, const std::vector<double>& shares);
  virtual ComposedState split(const Composition& block, ComposedState state);
  virtual ComposedState fuse(const Composition& block, ComposedState state);
  // The states of a block's children, one behind the other along the batch.
  virtual ComposedState joined_rows(BlockKind block, const std::vector<ComposedState>& states);

  const ComposedPart* find(const std::string& adapter) const;
  // Throws c10::Error when an adapter of the block has this method.
  void check_has_none(const Composition& block) const;
  [[noreturn]] void refuse(const std::string& reason) const;

  // Children of `block` on `state_of(i)`, those that are absent here left out.
  ComposedState child(const Composition& block, size_t i, const ComposedState& state, bool& is_present);
  ComposedState sliced(ComposedState state, int64_t dim, torch::jit::NamedValue begin, torch::jit::NamedValue end);
  // Makes the graph throw, as the library does, where dimension `dim` of `x` is not as long as the block's sizes say.
  void check_sizes(const Composition& block, Value* x, int64_t dim, const char* what, const char* field);
  Value* sum(const std::vector<Value*>& values, const std::vector<double>& shares);
  Value* joined(const std::vector<Value*>& values, int64_t dim);
  // All rows use this part.
  Inserter::Scope only(const ComposedPart& part);
  void add_gate(const ComposedPart& part, Value* gate) { gates_.push_back({part, gate}); }
  // The part's gate [rows, gates] of x [rows, S, I], added to gates(); null where the part has none.
  Value* pooled_gate(const ComposedPart& part, Value* x);

  Inserter& inserter_;
  torch::jit::Graph& graph_;
  const ComposedSite& site_;

 private:
  ComposedState stack(const Composition& block, ComposedState state);
  ComposedState average(const Composition& block, ComposedState state);
  ComposedState batch_split(const Composition& block, ComposedState state);
  ComposedState parallel(const Composition& block, ComposedState state);

  std::vector<Gate> gates_;
};

}  // namespace torchgraft
