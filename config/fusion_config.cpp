#include <torchgraft/config/fusion_config.h>

#include <torchgraft/config/json_fields.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>

#include <set>

namespace torchgraft {
namespace {

using json::Json;
using json::OrderedJson;

template <typename Config, typename Visit>
void visit_fusion_fields(Config& c, Visit visit) {
  visit("key", c.key);
  visit("query", c.query);
  visit("value", c.value);
  visit("query_before_ln", c.query_before_ln);
  visit("regularization", c.regularization);
  visit("residual_before", c.residual_before);
  visit("temperature", c.temperature);
  visit("value_before_softmax", c.value_before_softmax);
  visit("value_initialized", c.value_initialized);
  visit("dropout_prob", c.dropout_prob);
}

// What build_full_config() of the library writes around the configuration.
const std::set<std::string> kAround = {"config",     "hidden_size",   "model_class", "model_name",
                                       "model_type", "adapter_names", "name",        "version"};

}  // namespace

void check_supported(const FusionConfig& config) {
  TORCH_CHECK(!config.temperature, "adapter fusion: temperature=true is not supported: in the adapters library each ",
              "forward pass lowers the temperature, so that a result depends on how many came before; train with ",
              "temperature=false");
  const double dropout = config.dropout_prob.value_or(0.0);
  TORCH_CHECK(dropout >= 0.0 && dropout < 1.0, "adapter fusion: expected dropout_prob to be at least 0 and below 1, ",
              "got ", dropout);
}

FusionConfig fusion_config_from_json(std::string_view text) {
  const Json json = parse_json(text, "adapter fusion");
  check_texts(json, "adapter fusion");
  TORCH_CHECK(json.is_object() && json.contains("config"), "adapter fusion: expected an object with \"config\", got ",
              shown_json(json));
  for (const auto& [key, value] : json.items()) {
    TORCH_CHECK(kAround.count(key), "adapter fusion: the key '", shown_text(key), "' is not known");
  }
  FusionConfig result;
  const Json& fields = json.at("config");
  if (fields.is_string()) {
    const auto name = fields.get<std::string>();
    TORCH_CHECK(name == "static" || name == "dynamic", "adapter fusion: no configuration is called ",
                shown_json(fields), "; there are static and dynamic");
    const bool is_dynamic = name == "dynamic";
    result.value = result.regularization = result.value_initialized = is_dynamic;
  } else {
    TORCH_CHECK(fields.is_object(), "adapter fusion: expected config to be an object, got ", shown_json(fields));
    std::set<std::string> known;
    visit_fusion_fields(result, [&](const char* field, auto& member) {
      known.insert(field);
      if (fields.contains(field)) {
        json::read(field, fields.at(field), member);
      }
    });
    for (const auto& [key, value] : fields.items()) {
      TORCH_CHECK(known.count(key), "adapter fusion: the configuration has a field '", shown_text(key),
                  "', which is not known");
    }
  }
  check_supported(result);
  if (json.contains("name")) {
    json::read("name", json.at("name"), result.name);
  }
  if (json.contains("adapter_names")) {
    json::read("adapter_names", json.at("adapter_names"), result.adapters);
  }
  return result;
}

std::string fusion_config_to_json(const FusionConfig& config) {
  OrderedJson result;
  visit_fusion_fields(config,
                      [&](const char* field, const auto& member) { result["config"][field] = json::written(member); });
  result["name"] = config.name;
  result["adapter_names"] = config.adapters;
  return result.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

}  // namespace torchgraft
