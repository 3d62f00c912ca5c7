#pragma once

#include "request_error.h"
#include "sampling.h"

#include <cstdint>
#include <string>
#include <vector>

// The body of POST /v1/generate.
struct GenerateRequest {
  std::string adapter;          // empty: the base model
  std::vector<int64_t> prompt;  // at least one token
  int64_t max_new_tokens = 20;
  std::vector<int64_t> stop;  // ids that end the sequence, sorted; they are part of it
  SamplingOptions sampling;
  bool stream = false;
};

// How many tokens a cache comes to hold, and so how many positions are used: nothing reads the last token.
int64_t most_cached_tokens(const GenerateRequest& request);

// Throws RequestError 400 that says what is wrong. Knows neither model nor adapters.
GenerateRequest parse_generate(const std::string& text);
