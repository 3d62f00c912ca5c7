#pragma once

#include <torchgraft/patch/insert/inserter.h>

#include <map>
#include <tuple>
#include <utility>

namespace torchgraft {

// A residual site while it is rewritten: ops follow each other on the branch, but each reads the original values.
struct ResidualState {
  ResidualSite site;
  torch::jit::Value* branch = nullptr;      // before any adapter
  torch::jit::Value* sum = nullptr;         // branch + residual, made when an adapter asks for it
  torch::jit::Value* normed_sum = nullptr;  // norm(branch + residual), likewise
  // The residual stream behind the norm, or behind the add, with the adapters so far.
  torch::jit::Value* stream = nullptr;
};

// Adds bottlenecks to residual sites: branch + residual becomes op(branch) + residual.
class BottleneckInserter {
 public:
  explicit BottleneckInserter(Inserter& inserter) : inserter_(inserter), graph_(inserter.graph()) {}

  // Adds the bottleneck of `slot` to `site`. Returns the gate. Throws c10::Error where the configuration has no meaning
  // at this site: post_add without a norm, original_ln_after=False in a parallel block.
  torch::jit::Value* operator()(const Slot& slot, const ResidualSite& site);

  using NamedValue = torch::jit::NamedValue;
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  // For compositions. The state of a site as adapters of this slot see it, which lives as long as the inserter.
  ResidualState& state(const Slot& slot, const ResidualSite& site);
  // (output, gate) of a bottleneck on x; x and residual are [B, S, H].
  std::pair<Value*, Value*> bottleneck(const Slot& slot, Value* x, Value* residual);
  // The input of an adapter with original_ln_before: the norm of the model's sum, or the sum itself in a model without
  // a norm there.
  Value* normed_sum(ResidualState& state);
  // What a bottleneck adds to its residual, without a gate, and its gate.
  Value* up(const Slot& slot, Value* x);
  Value* gate(const Slot& slot, Value* x);
  // A copy of the site's norm that reads `x`; `x` itself where the site has none.
  Value* normed(ResidualState& state, Value* x);

 private:
  // `site` with the branch and the residual that an adapter of this slot takes for such.
  ResidualSite wired(const Slot& slot, ResidualSite site);
  Value* sum(ResidualState& state);
  Node* call_bottleneck(const Slot& slot, Value* x, Value* residual, at::ArrayRef<NamedValue> named);
  // Puts the adapter's output in place of the stream (original_ln_after=False): neither residual nor norm follows.
  void replace_stream(ResidualState& state, const Slot& slot, Value* output);

  Inserter& inserter_;
  torch::jit::Graph& graph_;
  // By the add, the operand that is the branch (parallel blocks may be two operands of one add), and the wiring.
  std::map<std::tuple<const Node*, size_t, BottleneckWiring>, ResidualState> residuals_;
};

}  // namespace torchgraft
