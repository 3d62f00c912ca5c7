#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

using Arguments = std::vector<c10::IValue>;  // of forward, without self and adapter_ids

// What a run of `method` in eval mode does: its graph, with the methods that it calls written in, without the branches
// of training.
std::shared_ptr<torch::jit::Graph> graph_of_run(const torch::jit::Module& module, const char* method);

// Runs methods of a module so that nobody sees it afterwards. Each run starts from the module's attributes as they are
// and works on copies of them and of its arguments; the module is in eval mode, autocast is off, gradients are not
// recorded, and what a run warns of is dropped.
class TrialRun {
 public:
  // `graph`: the graph_of_run. It decides which attributes a run has to copy: state always, tensors only when the
  // graph writes into them.
  TrialRun(torch::jit::Module module, const std::shared_ptr<torch::jit::Graph>& graph);

  // The same with all floating-point tensors of the module, and of arguments, in float64.
  TrialRun in_double() const;

  c10::IValue operator()(const char* method, const Arguments& arguments,
                         const std::optional<at::Tensor>& adapter_ids = std::nullopt) const;

 private:
  enum class Tensors { kShared, kCopied, kInDouble };

  torch::jit::Module copy() const;

  torch::jit::Module module_;
  Tensors tensors_;
};

// Why a run of `graph` could be seen afterwards, or not be repeated: side effects, writes into constants, random
// numbers. Empty if it could not.
std::string reason_not_to_run(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
