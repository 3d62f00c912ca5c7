#include "predict_request.h"

#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

#include <set>
#include <vector>

namespace {

using nlohmann::json;

constexpr int kDeepestBody = 4;  // body -> input_ids -> row -> id

// A value for a message: of lists and objects only the kind, for they may be as long as a body.
std::string shown(const json& value) {
  if (value.is_structured()) {
    return value.is_array() ? "a list" : "an object";
  }
  return torchgraft::shown_json(value, 40);
}

TokenRows read_rows(const json& list) {
  if (!list.is_array()) {
    throw RequestError(400, "\"input_ids\": expected a list of lists of integers, got " + shown(list));
  }
  TokenRows rows;
  for (const json& row : list) {
    const std::string place = "\"input_ids\"[" + std::to_string(rows.size()) + "]";
    if (!row.is_array()) {
      throw RequestError(400, place + ": expected a list of integers, got " + shown(row));
    }
    auto& ids = rows.emplace_back();
    for (const json& id : row) {
      if (!id.is_number_integer() || id < 0 || (id.is_number_unsigned() && id.get<uint64_t>() > INT64_MAX)) {
        throw RequestError(400, place + ": expected token ids, integers from 0, got " + shown(id));
      }
      ids.push_back(id.get<int64_t>());
    }
  }
  return rows;
}

// Refuses a name that an object has twice: a proxy that looks into the body may read the other value.
json parse_body(const std::string& text) {
  std::vector<std::set<std::string>> names;
  std::string twice;
  const auto watch = [&](int /*depth*/, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) {
      names.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      names.pop_back();
    } else if (event == json::parse_event_t::key && !names.back().insert(parsed.get<std::string>()).second) {
      twice = shown(parsed);
    }
    return true;
  };
  try {
    json body = torchgraft::parse_json(text, "the body", kDeepestBody, watch);
    if (!twice.empty()) {
      throw RequestError(400, "the body has " + twice + " twice");
    }
    return body;
  } catch (const c10::Error& error) {
    throw RequestError(400, error.what_without_backtrace());
  }
}

}  // namespace

PredictRequest parse_predict(const std::string& text) {
  const json body = parse_body(text);
  if (!body.is_object()) {
    throw RequestError(400, R"(expected {"adapter": name or null, "input_ids": [[...]]}, got )" + shown(body));
  }
  PredictRequest result;
  for (const auto& [key, value] : body.items()) {
    if (key == "adapter") {
      if (!value.is_null() && !(value.is_string() && !value.get_ref<const std::string&>().empty())) {
        throw RequestError(400, "\"adapter\": expected a name, or null for the base model, got " + shown(value));
      }
      result.adapter = value.is_null() ? "" : value.get<std::string>();
    } else if (key == "input_ids") {
      result.rows = read_rows(value);
    } else if (key == "pooling") {
      if (value != "first" && value != "mean") {
        throw RequestError(400, "\"pooling\": expected \"first\" or \"mean\", got " + shown(value));
      }
      result.pooling = value == "mean" ? Pooling::kMean : Pooling::kFirst;
    } else if (key == "texts") {
      throw RequestError(
          400, "\"texts\": this server takes token ids; `torchgraft serve` starts it with a tokenizer before it");
    } else {
      throw RequestError(400, "unknown field " + shown(key));
    }
  }
  if (!body.contains("input_ids")) {
    throw RequestError(400, "\"input_ids\" is missing");
  }
  return result;
}
