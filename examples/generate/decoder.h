#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

// What a file does not say of its decoder.
struct DecoderForm {
  int64_t heads = 0;  // of keys and values
  int64_t head_size = 0;
  int64_t layers = 0;           // where the cache is a list
  int64_t max_positions = 0;    // 0: not known
  bool mask_of_tokens = false;  // [B, P + S], 1 = real; else [B, 1, S, P + S], added to the scores
};

// A grafted decoder that takes keys and values of earlier passes and gives those of all passes back:
//   forward(ids [B, S], mask, positions [B, S], caches...) -> (logits [B, S, vocabulary], caches...)
// `positions` may be missing. Each cache is a tensor [B, heads, P, head size], or a tuple or a list of caches; forward
// gives them as it takes them.
class Decoder {
 public:
  // Throws std::runtime_error, or c10::Error.
  Decoder(const std::string& path, const DecoderForm& form);

  std::vector<std::string> adapter_names();  // adapter_ids index this list
  void activate(const std::string& name);

  // A batch of sequences; empty before the first pass.
  struct State {
    at::Tensor real;  // bool [B, P]: which tokens are no padding
    std::vector<c10::IValue> caches;
    at::Tensor adapter_ids;  // int64 [B]; undefined: the active adapter
  };
  State start(int64_t rows, const std::vector<int64_t>& adapter_ids) const;

  // Runs `ids` [B, S], of which `real` says what is no padding, behind the tokens of `state`. Returns the logits of the
  // last token, [B, vocabulary].
  at::Tensor step(State& state, const at::Tensor& ids, const at::Tensor& real);

 private:
  c10::IValue empty_cache(const c10::TypePtr& type, int64_t rows) const;
  void check_caches(const State& state) const;

  torch::jit::Module module_;
  std::string path_;
  DecoderForm form_;
  at::ScalarType dtype_;
  std::vector<c10::Argument> caches_;
  bool has_positions_ = false;
};
