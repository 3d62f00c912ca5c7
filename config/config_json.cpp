#include <torchgraft/config/config_json.h>

#include <torchgraft/config/config_union.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/config/json_fields.h>
#include <torchgraft/config/library_differences.h>
#include <torchgraft/config/named_configs.h>
#include <torchgraft/registration/parse_json.h>

#include <algorithm>
#include <utility>

namespace torchgraft {
namespace {

using json::Json;
using json::OrderedJson;
using json::read_config;
using json::written;

// The library knows VeRA by a float: LoRAConfig(vera_d=1, vera_b=0) is a plain LoRA there.
void check_vera_numbers(const Json& json) {
  const auto is = [&](const char* field, auto has_type) { return json.contains(field) && has_type(json.at(field)); };
  const auto is_float = [](const Json& value) { return value.is_number_float(); };
  const auto is_integer = [](const Json& value) { return value.is_number_integer(); };
  TORCH_CHECK(
      is("vera_d", is_float) || is("vera_b", is_float) || !(is("vera_d", is_integer) || is("vera_b", is_integer)),
      "config: AdapterHub takes LoRAConfig.vera_d and LoRAConfig.vera_b for VeRA only where one of them is a "
      "float; write 1.0 for 1");
}

MethodConfig read_method(const Json& json) {
  TORCH_CHECK(json.is_object(), "config: expected an object, got ", shown_json(json));
  const Json architecture = json.contains("architecture") ? json.at("architecture") : Json();
  if (architecture.is_null() || architecture == "bottleneck") {
    return read_config(json, "BnConfig", BnConfig{}, [](auto& config, auto visit) { visit_bn_fields(config, visit); },
                       {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity"});
  }
  if (architecture == "prefix_tuning") {
    return read_config(json, "PrefixTuningConfig", PrefixTuningConfig{},
                       [](auto& config, auto visit) { visit_prefix_fields(config, visit); });
  }
  if (architecture == "prompt_tuning") {
    return read_config(json, "PromptTuningConfig", PromptTuningConfig{},
                       [](auto& config, auto visit) { visit_prompt_fields(config, visit); });
  }
  if (architecture == "lora") {
    check_vera_numbers(json);
    return read_config(json, "LoRAConfig", LoRAConfig{},
                       [](auto& config, auto visit) { visit_lora_fields(config, visit); });
  }
  if (architecture == "mtl_lora") {
    LoRAConfig config;
    config.mtl_lora = true;
    return read_config(json, "MTLLoRAConfig", config,
                       [](auto& config, auto visit) { visit_mtl_lora_fields(config, visit); });
  }
  if (architecture == "reft") {
    return read_config(json, "ReftConfig", ReftConfig{},
                       [](auto& config, auto visit) { visit_reft_fields(config, visit); },
                       {"layers", "prefix_positions", "suffix_positions", "r", "orthogonality"});
  }
  TORCH_CHECK(architecture != "union", "config: a union inside a union is not possible");
  TORCH_CHECK(false, "config: the architecture ", shown_json(architecture),
              " is not supported (supported: bottleneck, prefix_tuning, prompt_tuning, lora, mtl_lora, reft and unions "
              "of them)");
}

AdapterConfig read_adapter(const Json& json) {
  TORCH_CHECK(json.is_object(), "config: expected a JSON object, got ", shown_json(json));
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

OrderedJson write_method(const MethodConfig& method) {
  OrderedJson result = OrderedJson::object();
  const auto visitor = [&](const char* field, const auto& member) { result[field] = written(member); };
  if (const auto* bottleneck = std::get_if<BnConfig>(&method)) {
    visit_bn_fields(*bottleneck, visitor);
  } else if (const auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
    result["architecture"] = "prefix_tuning";
    visit_prefix_fields(*prefix, visitor);
  } else if (const auto* prompt = std::get_if<PromptTuningConfig>(&method)) {
    result["architecture"] = "prompt_tuning";
    visit_prompt_fields(*prompt, visitor);
    if (prompt->random_uniform_scale == kPromptScale) {
      result.erase("random_uniform_scale");
    }
  } else if (const auto* reft = std::get_if<ReftConfig>(&method)) {
    result["architecture"] = "reft";
    visit_reft_fields(*reft, visitor);
    if (reft->subtract_projection) {
      result.erase("subtract_projection");
    }
  } else {
    const auto& lora = std::get<LoRAConfig>(method);
    result["architecture"] = lora.mtl_lora ? "mtl_lora" : "lora";
    lora.mtl_lora ? visit_mtl_lora_fields(lora, visitor) : visit_lora_fields(lora, visitor);
    for (const auto& [field, value] : {std::pair("vera_d", &lora.vera_d), std::pair("vera_b", &lora.vera_b)}) {
      if (*value) {
        result[field] = **value;  // a float, as the library tells VeRA
      }
    }
    for (const char* own : {"attn_output_lora", "gate_lora", "linear_maps", "lora_bias"}) {
      if (result.at(own) == false || result.at(own).empty()) {
        result.erase(own);
      }
    }
  }
  return result;
}

OrderedJson write_methods(const std::vector<MethodConfig>& methods) {
  if (methods.size() == 1) {
    return write_method(methods.front());
  }
  OrderedJson result;
  result["architecture"] = "union";
  result["configs"] = OrderedJson::array();
  for (const MethodConfig& method : methods) {
    result["configs"].push_back(write_method(method));
  }
  return result;
}

bool has_invertible(const AdapterConfig& config) {
  return std::any_of(config.methods.begin(), config.methods.end(), [](const MethodConfig& method) {
    const auto* bottleneck = std::get_if<BnConfig>(&method);
    return bottleneck && bottleneck->inv_adapter;
  });
}

std::string model_class_in(const Json& json) {
  const auto found = json.find("model_class");
  return found != json.end() && found->is_string() ? found->get<std::string>() : "";
}

}  // namespace

std::optional<int64_t> saved_prefix_heads(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos || text[begin] != '{') {
    return std::nullopt;  // a name, or a string with values
  }
  const Json json = parse_json(text, "config");
  if (!json.contains(kPrefixHeads)) {
    return std::nullopt;
  }
  int64_t heads = 0;
  json::read(kPrefixHeads, json.at(kPrefixHeads), heads);
  return heads;
}

AdapterConfig config_from_json(std::string_view text) {
  const Json json = parse_json(text, "config");
  check_texts(json, "config");
  // adapter_config.json wraps the config: {"config": {...} or "name", "hidden_size": ..., "model_type": ...}.
  const bool wrapped = json.is_object() && json.contains("config");
  const Json inner = wrapped ? json.at("config") : json;
  TORCH_CHECK(!inner.is_object() || !inner.empty(),
              "config: expected the fields of an adapter's configuration, or a name such as \"unipelt\", got {}");
  AdapterConfig config = inner.is_string() ? config_from_name(inner.get<std::string>()) : read_adapter(inner);
  if (wrapped && json.contains("gate_pooling")) {
    json::read("gate_pooling", json.at("gate_pooling"), config.gate_pooling);
    check_gate_pooling(config.gate_pooling, "config");
  }
  if (wrapped && json.contains("model_type") && json.at("model_type").is_string()) {
    const auto model = json.at("model_type").get<std::string>();
    config.wired_for = library_wiring(model, config);
    config.may_move_positions = library_moves_positions(model, config);
    if (has_invertible(config)) {
      const std::optional<bool> inverts = library_inverts_output(model, model_class_in(json));
      config.inverts_output = inverts.value_or(false);
      config.inverts_output_is_known = inverts.has_value();
    }
    if (model == "llama" || model == "mistral") {  // the library calls down_proj the intermediate, up_proj the output
      for (MethodConfig& method : config.methods) {
        if (auto* lora = std::get_if<LoRAConfig>(&method)) {
          std::swap(lora->intermediate_lora, lora->output_lora);
        }
      }
    }
  }
  if (wrapped && json.contains(kInvertsOutput)) {
    config.inverts_output_is_known = !json.at(kInvertsOutput).is_null();
    config.inverts_output = false;
    if (config.inverts_output_is_known) {
      json::read(kInvertsOutput, json.at(kInvertsOutput), config.inverts_output);
    }
  }
  return config;
}

std::string config_to_json(const AdapterConfig& config) {
  const OrderedJson inner = write_methods(config.methods);
  OrderedJson outer;
  outer["config"] = inner;
  if (!config.wired_for.empty()) {
    outer["model_type"] = config.wired_for;
  }
  if (!config.inverts_output_is_known) {
    outer[kInvertsOutput] = nullptr;
  } else if (!config.inverts_output) {
    outer[kInvertsOutput] = false;
  }
  if (pools_unpadded(config)) {
    outer["gate_pooling"] = config.gate_pooling;
  }
  return outer.size() == 1 ? inner.dump() : outer.dump();
}

}  // namespace torchgraft
