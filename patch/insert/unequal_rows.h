#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <string>

namespace torchgraft {

// Tokens [B, S, E] of a graph ([S, B, E] if sequence_first) that may end with filler in some rows.
struct UnequalRows {
  torch::jit::Value* tokens = nullptr;
  bool sequence_first = false;
  int64_t features = 0;
};

// Why the tokens of a row may not be followed by filler that attentions do not show; "" where they may. Then no token
// reads another one but through an attention [B, heads, tokens, features] or as the row's first one, and no number of
// tokens is read but as a size of a tensor. So a row's own tokens are what they are without the filler, whatever the
// filler is. The reason is a clause that names the node.
std::string why_not_unequal(torch::jit::Graph& graph, const torch::jit::Module& module, const UnequalRows& rows);

}  // namespace torchgraft
