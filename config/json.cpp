#include <torchgraft/config/adapter_config.h>
#include <torchgraft/config/fields.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <set>

namespace torchgraft {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

[[noreturn]] void wrong_type(const std::string& field, const char* expected, const Json& value) {
  TORCH_CHECK(false, "config: expected ", field, " to be ", expected, ", got ", value.dump());
}

// Whether an int64 holds `value` without rounding.
bool is_exact_integer(double value) { return value == std::floor(value) && std::abs(value) < 1e15; }

void read(const std::string& field, const Json& value, bool& target) {
  if (!value.is_boolean()) {
    wrong_type(field, "true or false", value);
  }
  target = value.get<bool>();
}

void read(const std::string& field, const Json& value, double& target) {
  if (!value.is_number()) {
    wrong_type(field, "a number", value);
  }
  target = value.get<double>();
}

void read(const std::string& field, const Json& value, int64_t& target) {
  const bool integral = value.is_number_integer() || (value.is_number_float() && is_exact_integer(value.get<double>()));
  if (!integral) {
    wrong_type(field, "an integer", value);
  }
  target = value.get<int64_t>();
}

void read(const std::string& field, const Json& value, std::string& target) {
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

template <typename Item>
void read(const std::string& field, const Json& value, std::optional<Item>& target) {
  if (value.is_null()) {
    target.reset();
    return;
  }
  read(field, value, target.emplace());
}

void read(const std::string& field, const Json& value, std::variant<double, std::string>& target) {
  if (value.is_string()) {
    target = value.get<std::string>();
  } else if (value.is_number()) {
    target = value.get<double>();
  } else {
    wrong_type(field, "a number or a string", value);
  }
}

void read(const std::string& field, const Json& value, std::variant<bool, std::string>& target) {
  if (value.is_string()) {
    target = value.get<std::string>();
  } else if (value.is_boolean()) {
    target = value.get<bool>();
  } else {
    wrong_type(field, "true, false or a string", value);
  }
}

void read(const std::string& field, const Json& value, std::variant<double, std::map<std::string, double>>& target) {
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

// Reads every field of `config` that `json` has; `required` must be there.
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
    TORCH_CHECK(known.count(field), "config: ", name, " has no field '", field, "'");
  }
  return config;
}

MethodConfig read_method(const Json& json) {
  TORCH_CHECK(json.is_object(), "config: expected an object, got ", json.dump());
  const Json architecture = json.contains("architecture") ? json.at("architecture") : Json();
  if (architecture.is_null() || architecture == "bottleneck") {
    return read_config(json, "BnConfig", BnConfig{}, [](auto& config, auto visit) { visit_bn_fields(config, visit); },
                       {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"});
  }
  if (architecture == "prefix_tuning") {
    return read_config(json, "PrefixTuningConfig", PrefixTuningConfig{},
                       [](auto& config, auto visit) { visit_prefix_fields(config, visit); });
  }
  if (architecture == "lora") {
    return read_config(json, "LoRAConfig", LoRAConfig{},
                       [](auto& config, auto visit) { visit_lora_fields(config, visit); });
  }
  TORCH_CHECK(architecture != "union", "config: a union inside a union is not possible");
  TORCH_CHECK(false, "config: the architecture ", architecture.dump(),
              " is not supported (supported: bottleneck, prefix_tuning, lora and unions of them)");
}

AdapterConfig read_adapter(const Json& json) {
  TORCH_CHECK(json.is_object(), "config: expected a JSON object, got ", json.dump());
  if (!json.contains("architecture") || json.at("architecture") != "union") {
    return AdapterConfig{{read_method(json)}};
  }
  TORCH_CHECK(json.contains("configs") && json.at("configs").is_array() && !json.at("configs").empty(),
              "config: a union needs a list \"configs\"");
  std::vector<MethodConfig> methods;
  for (const Json& method : json.at("configs")) {
    methods.push_back(read_method(method));
  }
  for (const auto& [field, value] : json.items()) {
    TORCH_CHECK(field == "architecture" || field == "configs", "config: a union has no field '", field, "'");
  }
  return config_union(std::move(methods));
}

template <typename Value>
OrderedJson written(const Value& value) {
  return value;
}

OrderedJson written(const double& value) {
  return is_exact_integer(value) ? OrderedJson(static_cast<int64_t>(value)) : OrderedJson(value);
}

// The oracle takes a scaling of 4.0, but not of 4.
OrderedJson written(const std::variant<double, std::string>& scaling) {
  return std::visit([](const auto& held) { return OrderedJson(held); }, scaling);
}

template <typename Value>
OrderedJson written(const std::optional<Value>& value) {
  return value ? written(*value) : OrderedJson();
}

OrderedJson written(const std::map<std::string, double>& value) {
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

OrderedJson write_method(const MethodConfig& method) {
  OrderedJson result = OrderedJson::object();
  const auto visitor = [&](const char* field, const auto& member) { result[field] = written(member); };
  if (const auto* bottleneck = std::get_if<BnConfig>(&method)) {
    visit_bn_fields(*bottleneck, visitor);
  } else if (const auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
    result["architecture"] = "prefix_tuning";
    visit_prefix_fields(*prefix, visitor);
  } else {
    result["architecture"] = "lora";
    visit_lora_fields(std::get<LoRAConfig>(method), visitor);
  }
  return result;
}

}  // namespace

AdapterConfig config_from_json(std::string_view text) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::parse_error& error) {
    TORCH_CHECK(false, "config: malformed JSON: ", error.what());
  }
  // adapter_config.json wraps the config: {"config": {...} or "name", "hidden_size": ..., "model_type": ...}.
  const bool wrapped = json.is_object() && json.contains("config");
  const Json inner = wrapped ? json.at("config") : json;
  return inner.is_string() ? config_from_name(inner.get<std::string>()) : read_adapter(inner);
}

std::string config_to_json(const AdapterConfig& config) {
  if (config.methods.size() == 1) {
    return write_method(config.methods.front()).dump();
  }
  OrderedJson result;
  result["architecture"] = "union";
  result["configs"] = OrderedJson::array();
  for (const MethodConfig& method : config.methods) {
    result["configs"].push_back(write_method(method));
  }
  return result.dump();
}

}  // namespace torchgraft
