#pragma once

#include <torchgraft/patch/module/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <string>
#include <utility>

namespace torchgraft {

// Banks as values of a graph, where adapters that are being trained have weights of their own: the bank that the ops
// read is then put together in the graph, [rows before; own weights; rows behind], so that gradients reach just those.
// All of it stands at the graph's top, once, however often a layer runs. With one adapter nothing is copied.
class TrainedWeights {
 public:
  // `adapters` is the value of the `adapters` submodule of `root`; nodes are inserted before `end`, in the order of the
  // calls. What is passed must outlive this.
  TrainedWeights(torch::jit::Graph& graph, const GraphSites& sites, const torch::jit::Module& root,
                 torch::jit::Value* adapters, torch::jit::Node* end)
      : graph_(graph), sites_(sites), root_(root), adapters_(adapters), end_(end) {}

  // The bank [N, ...] of a slot that has trainable adapters.
  torch::jit::Value* bank(const Slot& slot, const std::string& name);

 private:
  using Value = torch::jit::Value;

  Value* own_row(const Slot& slot, const OwnWeights& own, const std::string& name, Value* slot_module);
  Value* computed_row(const Slot& slot, const OwnWeights& own, const std::string& name, Value* slot_module);
  Value* padded(Value* row, at::IntArrayRef sizes, at::IntArrayRef wanted, const std::string& name);
  Value* prefix_states(const OwnWeights& own);
  Value* prefix_of_layer(const OwnWeights& own, bool is_value);
  Value* source(const OwnWeights& own, const std::string& place, const std::string& name);
  Value* phm_weight(const OwnWeights& own, const std::string& side);
  Value* weight_norm(const Slot& slot, const OwnWeights& own, Value* slot_module);
  Value* dropped(Value* value, double p);

  torch::jit::Graph& graph_;
  const GraphSites& sites_;
  const torch::jit::Module& root_;
  Value* adapters_;
  torch::jit::Node* end_;
  std::map<std::pair<std::string, std::string>, Value*> banks_;   // by "<layer>.<slot>" and parameter
  std::map<std::pair<std::string, std::string>, Value*> states_;  // MLPs' outputs, by adapter and location
};

}  // namespace torchgraft
