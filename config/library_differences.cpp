#include <torchgraft/config/library_differences.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/StringUtil.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <initializer_list>
#include <vector>

namespace torchgraft {
namespace {

constexpr const char* kAccept =
    "; train it anew here, or remove \"model_type\" from its adapter_config.json to accept the difference";

template <typename Method, typename Holds>
bool any_method(const AdapterConfig& config, const Holds& holds) {
  return std::any_of(config.methods.begin(), config.methods.end(), [&](const MethodConfig& method) {
    const auto* typed = std::get_if<Method>(&method);
    return typed && holds(*typed);
  });
}

bool is_one_of(const std::string& text, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), text) != names.end();
}

// What the library does with prefixes in models that compute attention with torch's scaled_dot_product_attention.
// Empty: what it does with others.
std::string effect_of_sdpa(const std::string& model, const nlohmann::json& adapter_config) {
  const char* const kFirstTokens = "takes prefixes for the first tokens where the decoder's mask is causal";
  if (model == "distilbert") {
    return "adds 1 to the scores of prefixes";
  }
  if (is_one_of(model, {"gpt2", "llama", "mistral"})) {
    return "takes prefixes for the first tokens in batches without padding, and hides them in batches with padding";
  }
  const auto model_class = adapter_config.find("model_class");
  const std::string name =
      model_class != adapter_config.end() && model_class->is_string() ? model_class->get<std::string>() : "";
  const bool is_decoder = name.ends_with("LMHeadModel") || name.ends_with("ForCausalLM");
  if (is_one_of(model, {"bart", "mbart", "plbart", "whisper", "encoder-decoder"}) ||
      (is_decoder && is_one_of(model, {"bert", "roberta", "xlm-roberta"}))) {
    return kFirstTokens;
  }
  return "";
}

bool has_prefixes(const AdapterConfig& config) {
  return any_method<PrefixTuningConfig>(config, [](const auto&) { return true; });
}

// Whether the numbers of layers, or prefixes, which the library keeps apart for each of two towers, matter.
bool names_layers(const AdapterConfig& config) {
  return has_prefixes(config) ||
         any_method<BnConfig>(config,
                              [](const BnConfig& bn) {
                                return !bn.leave_out.empty() || !std::holds_alternative<double>(bn.reduction_factor);
                              }) ||
         any_method<LoRAConfig>(config, [](const LoRAConfig& lora) { return !lora.leave_out.empty(); }) ||
         any_method<ReftConfig>(
             config, [](const ReftConfig& reft) { return !std::holds_alternative<std::string>(reft.layers); });
}

// The models in which the library's invertible adapter changes what enters the first layer's residual stream. Not so in
// Whisper (behind the encoder), Gemma (before the embeddings are scaled) and models of two models.
bool changes_first_input(const std::string& model) {
  return is_one_of(model, {"bert",    "roberta",         "xlm-roberta", "electra", "distilbert", "albert",
                           "deberta", "deberta-v2",      "vit",         "beit",    "gpt2",       "gptj",
                           "llama",   "mistral",         "t5",          "mt5",     "bart",       "mbart",
                           "plbart",  "clip_text_model", "qwen2",       "qwen3",   "modernbert", "phi"});
}

// Whether some ReFT of an adapter_config.json may be a NoReFT or a DiReFT.
bool may_be_direft(const nlohmann::json& config) {
  if (!config.is_object()) {  // a name
    return false;
  }
  if (config.contains("configs") && config.at("configs").is_array()) {
    return std::any_of(config.at("configs").begin(), config.at("configs").end(), may_be_direft);
  }
  return config.contains("orthogonality") && config.at("orthogonality") == false &&
         !config.contains("subtract_projection");
}

std::string refusal(const std::string& model, const AdapterConfig& config) {
  const bool has_inverse = any_method<BnConfig>(config, [](const BnConfig& bn) { return bn.inv_adapter.has_value(); });
  if (is_one_of(model, {"t5", "mt5"}) && has_prefixes(config)) {
    return "on T5 the adapters library moves the relative positions of all tokens by the length of the prefix, which "
           "torchgraft does not, so that the trained adapter would give other results" +
           std::string(kAccept);
  }
  const bool has_prompt = any_method<PromptTuningConfig>(config, [](const auto&) { return true; });
  if (has_prompt && model == "distilbert") {
    return "on DistilBERT the adapters library adds 1 to the scores of prompts in batches with padding, and fails with "
           "attn_implementation=\"eager\"" +
           std::string(kAccept);
  }
  if (has_inverse && !changes_first_input(model)) {
    return "it is not known that the adapters library puts invertible adapters of this model between the embeddings "
           "and the first layer, as torchgraft does" +
           std::string(kAccept);
  }
  return "";
}

}  // namespace

std::string library_wiring(const std::string& model_type, const AdapterConfig& config) {
  const bool differs =
      (model_type == "albert" && any_method<BnConfig>(config, [](const BnConfig& bn) { return bn.mh_adapter; })) ||
      (model_type == "gptj" && any_method<BnConfig>(config, [](const BnConfig& bn) { return bn.output_adapter; })) ||
      model_type == "encoder-decoder" || (model_type == "clip" && names_layers(config));
  return differs ? model_type : "";
}

bool library_moves_positions(const std::string& model_type, const AdapterConfig& config) {
  return has_prefixes(config) && !is_one_of(model_type, {"deberta", "deberta-v2"});
}

std::optional<bool> library_inverts_output(const std::string& model_type, const std::string& model_class) {
  // "ModelWithHeads" is the former name of "AdapterModel".
  if (model_class.ends_with("AdapterModel") || model_class.ends_with("ModelWithHeads") ||
      is_one_of(model_type, {"modernbert", "qwen2", "qwen3", "phi"})) {
    return true;
  }
  const bool has_own_head =
      model_class.find("For") != std::string::npos || is_one_of(model_class, {"GPT2LMHeadModel", "BertLMHeadModel"});
  return has_own_head ? std::optional(false) : std::nullopt;
}

LibraryDifference library_difference(std::string_view adapter_config) {
  const auto json = parse_json(adapter_config, "adapter_config.json");
  if (!json.is_object()) {
    return {};
  }
  LibraryDifference result;
  std::vector<std::string> warnings;
  if (json.contains("model_type") && json.at("model_type").is_string()) {
    const auto model = json.at("model_type").get<std::string>();
    const AdapterConfig config = config_from_json(adapter_config);
    result.refused = refusal(model, config);
    const std::string effect = has_prefixes(config) ? effect_of_sdpa(model, json) : "";
    if (!effect.empty()) {
      warnings.push_back(
          "if this prefix was trained with attn_implementation=\"sdpa\", it gives other results here: the adapters "
          "library then " +
          effect + "; with \"eager\" the results are the same");
    }
    if (model == "deberta") {
      warnings.push_back(
          "on DeBERTa (v1) the adapters library adds a random bias (memory that nothing has written) to the packed "
          "projection of queries, keys and values, another in every process; results here have no such bias");
    }
  }
  if (may_be_direft(json.value("config", nlohmann::json()))) {
    warnings.push_back(
        "if this ReFT was trained as DiReFT, it gives other results here: the adapters library does not write that the "
        "projection is not subtracted, and loads it as NoReFT, as torchgraft does; for a DiReFT add "
        "\"subtract_projection\": false to its \"config\"");
  }
  result.warned = c10::Join("; and ", warnings);
  return result;
}

}  // namespace torchgraft
