#pragma once

#include <torchgraft/config/closest_name.h>
#include <torchgraft/config/fields.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

// Reads fields of configurations from JSON and writes them. For config/ only.
namespace torchgraft::json {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

[[noreturn]] inline void wrong_type(const std::string& field, const char* expected, const Json& value) {
  TORCH_CHECK(false, "config: expected ", field, " to be ", expected, ", got ", shown_json(value));
}

// Whether `value` is a whole number that an int64 holds exactly.
inline bool is_exact_integer(double value) { return value == std::floor(value) && std::abs(value) < 1e15; }

inline void read(const std::string& field, const Json& value, bool& target) {
  if (!value.is_boolean()) {
    wrong_type(field, "true or false", value);
  }
  target = value.get<bool>();
}

inline void read(const std::string& field, const Json& value, double& target) {
  if (!value.is_number()) {
    wrong_type(field, "a number", value);
  }
  target = value.get<double>();
}

inline void read(const std::string& field, const Json& value, int64_t& target) {
  const bool wraps = value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX;
  const bool integral = value.is_number_integer() || (value.is_number_float() && is_exact_integer(value.get<double>()));
  if (!integral || wraps) {
    wrong_type(field, wraps ? "an integer below 2^63" : "an integer", value);
  }
  target = value.get<int64_t>();
}

inline void read(const std::string& field, const Json& value, std::string& target) {
  if (!value.is_string()) {
    wrong_type(field, "a string", value);
  }
  target = value.get<std::string>();
}

template <typename Item>
void read(const std::string& field, const Json& value, std::vector<Item>& target) {
  if (!value.is_array()) {
    wrong_type(field, "a list", value);
  }
  target.clear();
  for (const Json& item : value) {
    target.emplace_back();
    read(field + "[]", item, target.back());
  }
}

inline void read(const std::string& field, const Json& value, std::map<std::string, int64_t>& target) {
  if (!value.is_object()) {
    wrong_type(field, "a map from label to number", value);
  }
  target.clear();
  for (const auto& [key, number] : value.items()) {
    read(field + "." + key, number, target[key]);
  }
}

template <typename Item>
void read(const std::string& field, const Json& value, std::optional<Item>& target) {
  if (value.is_null()) {
    target.reset();
    return;
  }
  read(field, value, target.emplace());
}

inline void read(const std::string& field, const Json& value, std::variant<double, std::string>& target) {
  if (value.is_string()) {
    target = value.get<std::string>();
  } else if (value.is_number()) {
    target = value.get<double>();
  } else {
    wrong_type(field, "a number or a string", value);
  }
}

inline void read(const std::string& field, const Json& value, std::variant<bool, std::string>& target) {
  if (value.is_string()) {
    target = value.get<std::string>();
  } else if (value.is_boolean()) {
    target = value.get<bool>();
  } else {
    wrong_type(field, "true, false or a string", value);
  }
}

inline void read(const std::string& field, const Json& value, std::variant<std::string, std::vector<int64_t>>& target) {
  if (value.is_string()) {
    target = value.get<std::string>();
  } else if (value.is_array()) {
    read(field, value, target.emplace<std::vector<int64_t>>());
  } else {
    wrong_type(field, "a string or a list", value);
  }
}

inline void read(const std::string& field, const Json& value,
                 std::variant<double, std::map<std::string, double>>& target) {
  if (value.is_number()) {
    target = value.get<double>();
    return;
  }
  if (!value.is_object()) {
    wrong_type(field, "a number or a map from layer to number", value);
  }
  std::map<std::string, double> by_layer;
  for (const auto& [layer, factor] : value.items()) {
    read(field + "." + layer, factor, by_layer[layer]);
  }
  target = by_layer;
}

// `config` with the values of those fields that `json` has; it must have the `required` ones, and no unknown one.
template <typename Config, typename Visit>
Config read_config(const Json& json, const char* name, Config config, Visit visit,
                   const std::set<std::string>& required = {}) {
  std::set<std::string> known = {"architecture"};
  visit(config, [&](const char* field, auto& member) {
    known.insert(field);
    if (json.contains(field)) {
      read(std::string(name) + "." + field, json.at(field), member);
    } else {
      TORCH_CHECK(!required.count(field), "config: ", name, " needs the field ", field);
    }
  });
  for (const auto& [field, value] : json.items()) {
    TORCH_CHECK(known.count(field), "config: ", name, " has no field '", field, "'; it has: ", c10::Join(", ", known),
                did_you_mean(field, {known.begin(), known.end()}));
  }
  return config;
}

template <typename Value>
OrderedJson written(const Value& value) {
  return value;
}

inline OrderedJson written(const double& value) {
  return is_exact_integer(value) ? OrderedJson(static_cast<int64_t>(value)) : OrderedJson(value);
}

// The oracle takes a scaling of 4.0, but not of 4.
inline OrderedJson written(const std::variant<double, std::string>& scaling) {
  return std::visit([](const auto& held) { return OrderedJson(held); }, scaling);
}

template <typename Value>
OrderedJson written(const std::optional<Value>& value) {
  return value ? written(*value) : OrderedJson();
}

inline OrderedJson written(const std::map<std::string, double>& value) {
  OrderedJson result = OrderedJson::object();
  for (const auto& [key, number] : value) {
    result[key] = written(number);
  }
  return result;
}

template <typename... Values>
OrderedJson written(const std::variant<Values...>& value) {
  return std::visit([](const auto& held) { return written(held); }, value);
}

}  // namespace torchgraft::json
