#include "request_body.h"

#include "request_error.h"

#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

#include <set>

using nlohmann::json;

json parse_body(const std::string& text, int deepest) {
  std::vector<std::set<std::string>> names;
  std::string twice;
  const auto watch = [&](int /*depth*/, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) {
      names.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      names.pop_back();
    } else if (event == json::parse_event_t::key && !names.back().insert(parsed.get<std::string>()).second) {
      twice = shown_value(parsed);
    }
    return true;
  };
  try {
    json body = torchgraft::parse_json(text, "the body", deepest, watch);
    if (!twice.empty()) {
      throw RequestError(400, "the body has " + twice + " twice");
    }
    return body;
  } catch (const c10::Error& error) {
    throw RequestError(400, error.what_without_backtrace());
  }
}

std::string shown_value(const json& value) {
  if (value.is_structured()) {
    return value.is_array() ? "a list" : "an object";
  }
  return torchgraft::shown_json(value, 40);
}

std::string read_adapter_name(const json& value) {
  if (!value.is_null() && !(value.is_string() && !value.get_ref<const std::string&>().empty())) {
    throw RequestError(400, "\"adapter\": expected a name, or null for the base model, got " + shown_value(value));
  }
  return value.is_null() ? "" : value.get<std::string>();
}

std::vector<int64_t> read_ids(const json& list, const std::string& place) {
  if (!list.is_array()) {
    throw RequestError(400, place + ": expected a list of integers, got " + shown_value(list));
  }
  std::vector<int64_t> ids;
  for (const json& id : list) {
    if (!id.is_number_integer() || id < 0 || (id.is_number_unsigned() && id.get<uint64_t>() > INT64_MAX)) {
      throw RequestError(400, place + ": expected token ids, integers from 0, got " + shown_value(id));
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}
