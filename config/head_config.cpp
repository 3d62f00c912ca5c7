#include <torchgraft/config/head_config.h>

#include <torchgraft/activations/activation.h>
#include <torchgraft/config/json_fields.h>
#include <torchgraft/registration/parse_json.h>

#include <algorithm>

namespace torchgraft {
namespace {

using json::Json;
using json::OrderedJson;

const std::vector<std::string> kHeadTypes = {"classification", "multilabel_classification", "tagging"};

// Models whose heads the library lets read the last token that is no padding; others read the first one.
const std::vector<std::string> kLastTokenModels = {"gpt2", "gptj", "llama", "mistral"};
// Models whose heads for whole texts read the last end-of-sequence token, or the mean over all patches.
const std::vector<std::string> kOtherTokenModels = {"bart", "mbart", "plbart", "t5", "mt5", "whisper", "beit"};

bool holds(const std::vector<std::string>& names, const Json& name) {
  return std::any_of(names.begin(), names.end(), [&](const std::string& known) { return name == known; });
}

void require_known(const std::string& field, const std::string& value, const std::vector<std::string>& names) {
  TORCH_CHECK(std::find(names.begin(), names.end(), value) != names.end(), "head: ", field, "=\"", value,
              "\" is not supported (supported: ", c10::Join(", ", names), ")");
}

}  // namespace

bool is_known_head(std::string_view text) {
  const Json whole = parse_json(text, "head");
  TORCH_CHECK(whole.is_object(), "head: expected a JSON object, as AdapterHub's head_config.json; the file is damaged");
  if (!whole.contains("config") || !whole.at("config").is_object()) {
    return false;  // heads of transformers' own classes have no such object
  }
  const Json& config = whole.at("config");
  const Json type = config.value("head_type", Json());
  if (config.value("use_pooler", Json()) == true) {
    return false;  // the head reads the result of the model's pooler, not its tokens
  }
  const bool reads_other_token = holds(kOtherTokenModels, whole.value("model_type", Json())) && type != "tagging";
  return holds(kHeadTypes, type) && !reads_other_token;
}

HeadConfig head_config_from_json(std::string_view text) {
  const Json whole = parse_json(text, "head");
  check_texts(whole, "head");
  TORCH_CHECK(whole.is_object() && whole.contains("config") && whole.at("config").is_object(),
              "head: expected JSON with an object \"config\", as AdapterHub's head_config.json");
  HeadConfig config = json::read_config(whole.at("config"), "HeadConfig", HeadConfig{},
                                        [](auto& held, auto visit) { visit_head_fields(held, visit); });
  if (whole.contains("pooling")) {
    json::read("HeadConfig.pooling", whole.at("pooling"), config.pooling);
  } else if (holds(kLastTokenModels, whole.value("model_type", Json()))) {
    config.pooling = "last";
  }
  check_supported(config);
  return config;
}

std::string head_config_to_json(const HeadConfig& config) {
  OrderedJson fields = OrderedJson::object();
  visit_head_fields(config, [&](const char* field, const auto& member) { fields[field] = json::written(member); });
  if (config.head_type == "tagging") {  // the library's tagging head takes neither
    fields.erase("use_pooler");
    fields.erase("bias");
  }
  return OrderedJson({{"config", fields}, {"pooling", config.pooling}}).dump();
}

void check_supported(const HeadConfig& config) {
  require_known("head_type", config.head_type, kHeadTypes);
  require_known("pooling", config.pooling, {"first", "mean", "last"});
  TORCH_CHECK(config.num_labels >= 1, "head: expected num_labels of at least 1, got ", config.num_labels);
  TORCH_CHECK(config.layers >= 1, "head: expected layers of at least 1, got ", config.layers);
  TORCH_CHECK(!config.use_pooler, "head: use_pooler=True is not supported: a module's pooler is not looked for");
  TORCH_CHECK(config.bias || config.head_type != "tagging", "head: a tagging head has a bias");
  const double dropout = config.dropout_prob.value_or(0.0);
  TORCH_CHECK(dropout >= 0.0 && dropout < 1.0, "head: expected dropout_prob of at least 0 and below 1, got ", dropout);
  if (config.activation_function) {
    require_known("activation_function", *config.activation_function, non_linearity_names());
  }
  if (config.label2id) {
    std::set<int64_t> ids;
    for (const auto& [label, id] : *config.label2id) {
      TORCH_CHECK(id >= 0 && id < config.num_labels && ids.insert(id).second,
                  "head: expected label2id to give each of ", config.num_labels,
                  " labels an id of its own from 0 on, got ", id, " for \"", label, "\"");
    }
  }
}

}  // namespace torchgraft
