#pragma once

#include <torchgraft/patch/adapter_bank.h>

#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <string>
#include <utility>

namespace torchgraft {

// Banks as values of a graph, where adapters that are being trained have weights of their own: the bank that the ops read
// is then put together in the graph, [rows before; own weights; rows behind], so that gradients reach just those. All of
// it stands at the graph's top, once, however often a layer runs. With one adapter nothing is copied.
class TrainedWeights {
 public:
  // `adapters` is the value of the `adapters` submodule; nodes are inserted before `end`, in the order of the calls.
  TrainedWeights(torch::jit::Graph& graph, torch::jit::Value* adapters, torch::jit::Node* end)
      : graph_(graph), adapters_(adapters), end_(end) {}

  // The bank [N, ...] of a slot that has trainable adapters.
  torch::jit::Value* bank(const BankSlot& slot, const std::string& name);

 private:
  using Value = torch::jit::Value;

  Value* own_row(const BankSlot& slot, const OwnWeights& own, const std::string& name, Value* slot_module);
  Value* padded(Value* row, at::IntArrayRef sizes, at::IntArrayRef wanted, const std::string& name);
  Value* prefix_states(const OwnWeights& own);
  Value* prefix_of_layer(const OwnWeights& own, bool is_value);
  Value* dropped(Value* value, double p);

  torch::jit::Graph& graph_;
  Value* adapters_;
  torch::jit::Node* end_;
  std::map<std::pair<std::string, std::string>, Value*> banks_;   // by "<layer>.<slot>" and parameter
  std::map<std::pair<std::string, std::string>, Value*> states_;  // MLPs' outputs, by adapter and location
};

}  // namespace torchgraft
