#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

using TokenRows = std::vector<std::vector<int64_t>>;
using Outputs = std::vector<std::vector<float>>;  // one vector per row

// What is answered of a hidden state [tokens, hidden]: that of the first token, or the mean over the row's own tokens.
enum class Pooling { kFirst, kMean };

size_t longest_row(const TokenRows& rows);

// How a text encoder is called: forward(input_ids, attention_mask, ...), with [rows, tokens] int64 each.
class Signature {
 public:
  // Reads the arguments of `module`'s forward: a name with "mask" in it is the mask, one with "type" the token types
  // (all 0), the first other one the token ids. Throws std::runtime_error when there is another that must be given.
  // pad_id: the token behind the end of shorter rows.
  explicit Signature(const torch::jit::Module& module, int64_t pad_id = 0);

  // One forward pass. adapter_ids: one per row. A result [rows, tokens, hidden] is pooled, row by row; [rows, n] is
  // taken as it is.
  Outputs run(const torch::jit::Module& module, const TokenRows& rows, const std::vector<int64_t>& adapter_ids,
              const std::vector<Pooling>& pooling) const;

 private:
  enum class Input { kIds, kMask, kTypes, kNone };
  std::vector<Input> inputs_;
  int64_t pad_id_;
};
