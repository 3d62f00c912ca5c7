#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <optional>
#include <string>

namespace torchgraft {

// The method that holds forward as the base had it, where it calls other methods, its submodules' among them: such a
// graph is short, and base_forward no longer tells which methods of the module it consists of. remove_methods() gives
// it back, and called_by_forward() reads it. Nothing runs it.
constexpr const char* kOriginalForward = "original_forward";

// What to do with a base that has a name which grafting adds: ends an error.
std::string name_remedy(const std::string& name);

// True for a module that graft() made.
bool is_grafted(const torch::jit::Module& module);

// Throws c10::Error, on behalf of the function `what`, when nothing is grafted onto `module`.
void check_grafted(const torch::jit::Module& module, const char* what);

// The active adapter of a grafted module; empty when there is none.
std::string active_name(const torch::jit::Module& grafted);

// While it lives, `name` is the active adapter of a grafted module; an empty one changes nothing. Then the one that was
// before is again, whether a run has failed or not.
class WhileActive {
 public:
  WhileActive(torch::jit::Module grafted, const std::string& name);
  WhileActive(const WhileActive&) = delete;
  WhileActive& operator=(const WhileActive&) = delete;
  ~WhileActive();

 private:
  torch::jit::Module grafted_;
  std::optional<std::string> before_;  // empty text: none was active
};

// What forward_with_head needs to know of forward.
struct HeadInputs {
  std::string token_mask;       // the argument that is the token mask; empty: none
  bool sequence_first = false;  // the hidden states are [S, B, H]
};

// Gives `module`, which has the submodule `adapters` already, its grafted methods. `forward` becomes `base_forward`;
// the graph `grafted`, with adapter_ids as its last input and (result, gates) as its result, becomes `grafted_forward`.
// On top of these come forward(..., adapter_ids=None), forward_with_gates, the methods for adapters and, if there are
// heads, forward_with_head. forward runs the untouched base when no adapter is active and no adapter_ids are given.
void add_methods(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& grafted,
                 const HeadInputs& heads);

// For those who change base_forward: after remove_methods(), forward is what base_forward is now.
void forget_original_forward(torch::jit::Module& module);

// Undoes add_methods and removes the submodule `adapters`: the base's methods and attributes are left.
void remove_methods(torch::jit::Module& module);

}  // namespace torchgraft
