#include "predict_request.h"

#include "request_body.h"

#include <nlohmann/json.hpp>

#include <string>

namespace {

using nlohmann::json;

constexpr int kDeepestBody = 4;  // body -> input_ids -> row -> id

TokenRows read_rows(const json& list) {
  if (!list.is_array()) {
    throw RequestError(400, "\"input_ids\": expected a list of lists of integers, got " + shown_value(list));
  }
  TokenRows rows;
  for (const json& row : list) {
    const std::string place = "\"input_ids\"[" + std::to_string(rows.size()) + "]";
    rows.push_back(read_ids(row, place));
  }
  return rows;
}

}  // namespace

PredictRequest parse_predict(const std::string& text) {
  const json body = parse_body(text, kDeepestBody);
  if (!body.is_object()) {
    throw RequestError(400, R"(expected {"adapter": name or null, "input_ids": [[...]]}, got )" + shown_value(body));
  }
  PredictRequest result;
  for (const auto& [key, value] : body.items()) {
    if (key == "adapter") {
      result.adapter = read_adapter_name(value);
    } else if (key == "input_ids") {
      result.rows = read_rows(value);
    } else if (key == "pooling") {
      if (value != "first" && value != "mean") {
        throw RequestError(400, "\"pooling\": expected \"first\" or \"mean\", got " + shown_value(value));
      }
      result.pooling = value == "mean" ? Pooling::kMean : Pooling::kFirst;
    } else if (key == "texts") {
      throw RequestError(
          400, "\"texts\": this server takes token ids; `torchgraft serve` starts it with a tokenizer before it");
    } else {
      throw RequestError(400, "unknown field " + shown_value(key));
    }
  }
  if (!body.contains("input_ids")) {
    throw RequestError(400, "\"input_ids\" is missing");
  }
  return result;
}
