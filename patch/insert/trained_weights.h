#pragma once

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <string>
#include <utility>

namespace torchgraft {

// Makes the banks of slots with trainable adapters as values of a graph. The graph puts such a bank together from
// [rows before; own weights; rows behind], so that gradients reach the own weights alone. It does so once, at its top,
// however often a layer runs. With one adapter nothing is copied.
class TrainedWeights {
 public:
  // `adapters` is the value of the `adapters` submodule of `root`. Nodes are inserted before `end`, in the order of the
  // calls. All arguments must outlive the TrainedWeights.
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
  Value* source(const OwnWeights& own, const std::string& key, const std::string& name);
  Value* phm_weight(const OwnWeights& own, const std::string& side);
  Value* factored(const OwnWeights& own, const std::string& name);
  Value* reft_projection(const OwnWeights& own);
  Value* weight_norm(const Slot& slot, const OwnWeights& own, Value* slot_module);
  Value* dropped(Value* value, double p);

  torch::jit::Graph& graph_;
  const GraphSites& sites_;
  const torch::jit::Module& root_;
  Value* adapters_;
  torch::jit::Node* end_;
  std::map<std::pair<std::string, std::string>, Value*> banks_;   // by "<layer>.<slot>" and parameter
  std::map<std::pair<std::string, std::string>, Value*> states_;  // results of prefix MLPs, by adapter and pool
};

}  // namespace torchgraft
