#pragma once

#include "package.h"
#include "predict_request.h"

#include <torchgraft/patch/forward_inputs.h>
#include <torchgraft/patch/text_limits.h>

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// The answer for one row: numbers, or `columns` numbers for each of its tokens.
struct Output {
  std::vector<float> values;
  int64_t columns = 0;  // 0: not by token
};
using Outputs = std::vector<Output>;

size_t longest_row(const TokenRows& rows);

// How a text encoder is called: forward(input_ids, attention_mask, ...), with [rows, tokens] int64 each. An encoder
// that takes no mask would read padding as tokens: it gets rows of one length at a time.
class Signature {
 public:
  // Throws c10::Error when forward needs something that token ids do not give (torchgraft::ForwardInputs).
  // pad_id: the token behind the end of shorter rows. package: what runs in the module's place; it must outlive this.
  explicit Signature(const torch::jit::Module& module, int64_t pad_id = 0, Package* package = nullptr);

  struct Result {
    at::Tensor states;  // float [rows, tokens, hidden], or what the model returns instead: [rows, n]
    at::Tensor mask;    // int64 [rows, tokens], 1 where a token is real
  };

  // One forward pass; of a model without a mask, one for each length of row. module: unused where a package runs.
  // adapter_ids: one per row.
  Result run(const torch::jit::Module& module, const TokenRows& rows, const std::vector<int64_t>& adapter_ids) const;

  bool takes_mask() const { return inputs_.takes_mask(); }

  // As far as the graph shows them.
  const torchgraft::TextLimits& limits() const { return limits_; }

 private:
  Result run_padded(const torch::jit::Module& module, const TokenRows& rows,
                    const std::vector<int64_t>& adapter_ids) const;

  torchgraft::ForwardInputs inputs_;
  torchgraft::TextLimits limits_;
  int64_t pad_id_;
  Package* package_;
};

// The answers for states [n, tokens, hidden], pooled (not kHead); states [n, k] are answers already. `rows`: the
// tokens.
Outputs pool_states(const at::Tensor& states, const TokenRows& rows, Pooling pooling);

// The answers for logits [n, L]; for [n, tokens, L] those of a row's own tokens. `rows`: the tokens.
Outputs read_logits(const at::Tensor& logits, const TokenRows& rows);
