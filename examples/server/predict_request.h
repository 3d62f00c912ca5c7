#pragma once

#include "request_error.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

using TokenRows = std::vector<std::vector<int64_t>>;

// What the server answers for a row: the hidden state of its first token, the mean over its own tokens, or the logits
// of its adapter's head.
enum class Pooling { kFirst, kMean, kHead };

// The body of POST /v1/predict.
struct PredictRequest {
  std::string adapter;  // empty: the base model
  TokenRows rows;
  std::optional<Pooling> pooling;
};

// Throws RequestError 400 that says what is wrong. Knows neither model nor adapters.
PredictRequest parse_predict(const std::string& text);
