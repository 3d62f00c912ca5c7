#pragma once

#include "decoder_state.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

// No product of these wraps.
constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kLargestHead = 1 << 16;
constexpr int64_t kMostLayers = 1 << 10;

// What a file does not say of its decoder.
struct DecoderForm {
  int64_t heads = 0;  // of keys and values
  int64_t head_size = 0;
  int64_t layers = 0;           // where the cache is a list
  int64_t max_positions = 0;    // 0: not known
  bool mask_of_tokens = false;  // [B, P + S], 1 = real; else [B, 1, S, P + S], added to the scores
};

// Whether forward has an argument for positions, behind ids and mask.
bool takes_positions(const torch::jit::Module& module);

// Loads a decoder. Throws std::runtime_error.
torch::jit::Module load_decoder(const std::string& path);

// A decoder, grafted or not, that takes keys and values of earlier passes and gives those of all passes back:
//   forward(ids [B, S], mask, positions [B, S], caches...) -> (logits [B, S, vocabulary], caches...)
// `positions` may be missing: the decoder then counts, padding included, so a sequence must have none. Each cache is a
// tensor [B, heads, P, head size], or a tuple or a list of caches; forward gives them as it takes them.
class Decoder {
 public:
  // `name`: of the module, for errors. Throws std::runtime_error.
  Decoder(const torch::jit::Module& module, std::string name, const DecoderForm& form);

  // A batch of sequences before their first pass. Without ids: the active adapter. Throws std::runtime_error.
  DecoderState start(int64_t rows, const std::vector<int64_t>& adapter_ids) const;

  // Runs `ids` [B, S], of which `real` says what is no padding, behind the tokens of `state`. Returns the logits of the
  // last token, [B, vocabulary]. Throws std::runtime_error, also when a sequence has padding and the decoder takes no
  // positions; then `state` is as it was.
  at::Tensor step(DecoderState& state, const at::Tensor& ids, const at::Tensor& real) const;

  // Runs two sequences of a few tokens, in two passes. Throws std::runtime_error that names what of the form may be
  // wrong.
  void try_out() const;

  bool has_positions() const { return has_positions_; }
  int64_t bytes_per_token() const;  // of the caches of one sequence

 private:
  c10::IValue empty_cache(const c10::TypePtr& type, int64_t rows) const;
  void check_positions(const at::Tensor& real) const;
  void check_result(const c10::IValue& result, const at::Tensor& ids) const;
  void check_caches(const DecoderState& state) const;

  torch::jit::Module module_;
  std::string name_;
  DecoderForm form_;
  at::ScalarType dtype_;
  std::vector<c10::Argument> caches_;
  bool has_positions_ = false;
};
