#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// Why the server refuses a request, and the status of the answer.
struct RequestError : std::runtime_error {
  RequestError(int code, const std::string& message) : std::runtime_error(message), status(code) {}
  int status;
};

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
