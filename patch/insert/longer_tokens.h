#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <vector>

namespace torchgraft {

// A value of the graph that holds tokens, with more of them than forward got.
struct LongerTokens {
  torch::jit::Value* tokens = nullptr;  // [B, P + S, E], or [P + S, B, E]
  bool sequence_first = false;
  torch::jit::Value* before = nullptr;  // the same without the P tokens
  int64_t features = 0;                 // E
  // Rows may have prompts of different lengths: [B], or [1] for all of them. P is the longest, an int. `own` tells of
  // each token whether it is the row's, [B, P + S], and is None where all are; null where rows are equally long.
  torch::jit::Value* lengths = nullptr;
  torch::jit::Value* added = nullptr;
  torch::jit::Value* own = nullptr;
};

// Makes what is computed from `longer.tokens` right for P more tokens: attention masks that come from forward's
// arguments get P more columns (and P more rows where they have a row for each token), visible ones, as the adapters
// library pads them; sizes that are the number of tokens become the longer one.
//
// The rule that makes this sound: whatever is computed from the longer tokens is what the model computes of so many
// tokens, if it depends on forward's arguments in no other way than through such masks, the number of rows, dtypes,
// devices, and whether an optional argument is there; and if no number of tokens is a constant in it. Throws
// c10::Error, which names the node, where the graph does not follow the rule.
//
// In rows with shorter prompts the columns of a mask follow the row's own tokens, and attentions do not show what comes
// behind them. Whether that is enough, why_not_unequal() says (unequal_rows.h).
void make_longer(torch::jit::Graph& graph, const torch::jit::Module& module, const LongerTokens& longer,
                 const torch::jit::Value* adapter_ids);

}  // namespace torchgraft
