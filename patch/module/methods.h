#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <string>

namespace torchgraft {

// True for a module that graft() made.
bool is_grafted(const torch::jit::Module& module);

// Throws c10::Error, on behalf of the function `what`, when nothing is grafted onto `module`.
void check_grafted(const torch::jit::Module& module, const char* what);

// The active adapter of a grafted module; empty when there is none.
std::string active_name(const torch::jit::Module& grafted);

// What forward_with_head needs to know of forward.
struct HeadInputs {
  std::string token_mask;       // the argument that is the token mask; empty: none
  bool sequence_first = false;  // its hidden states are [S, B, H]
};

// Gives `module`, whose submodule `adapters` is there already, its grafted methods: `forward` becomes `base_forward`,
// the graph `grafted` (with adapter_ids as last input and (result, gates) as result) becomes `grafted_forward`, and
// forward(..., adapter_ids=None), forward_with_gates and the adapter methods are made on top of them. forward takes the
// base path, untouched, when no adapter is active and no adapter_ids are given. Where adapters have heads,
// forward_with_head is made, too.
void add_methods(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& grafted,
                 const HeadInputs& heads);

// The inverse, on a grafted module: the base's methods and attributes are left.
void remove_methods(torch::jit::Module& module);

}  // namespace torchgraft
