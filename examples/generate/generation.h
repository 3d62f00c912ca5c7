#pragma once

#include "decoder.h"
#include "prompts.h"
#include "sampling.h"

#include <functional>
#include <set>
#include <vector>

struct GenerationOptions {
  int64_t max_new_tokens = 20;
  std::set<int64_t> stop;  // ids that end a sequence; they are part of it
  SamplingOptions sampling;
  std::vector<int64_t> adapter_ids;  // one for each prompt; empty: the active adapter
};

// Prompts of one batch, padded on the left.
struct PaddedPrompts {
  at::Tensor ids;   // int64 [B, S]
  at::Tensor real;  // bool [B, S]: which tokens are no padding
};
PaddedPrompts pad_prompts(const std::vector<Tokens>& prompts);

// Called for each new token as soon as it is known.
using OnToken = std::function<void(int64_t row, int64_t token)>;

// The new tokens of each prompt.
std::vector<Tokens> generate(const Decoder& decoder, const std::vector<Tokens>& prompts,
                             const GenerationOptions& options, const OnToken& on_token);
