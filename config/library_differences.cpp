#include <torchgraft/config/library_differences.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/registration/parse_json.h>

#include <algorithm>
#include <initializer_list>

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

}  // namespace

LibraryDifference library_difference(std::string_view adapter_config) {
  const auto json = parse_json(adapter_config, "adapter_config.json");
  if (!json.is_object() || !json.contains("model_type") || !json.at("model_type").is_string()) {
    return {};
  }
  const auto model = json.at("model_type").get<std::string>();
  const AdapterConfig config = config_from_json(adapter_config);
  const bool has_prefix = any_method<PrefixTuningConfig>(config, [](const auto&) { return true; });
  LibraryDifference result;
  if (model == "albert" && any_method<BnConfig>(config, [](const BnConfig& bn) { return bn.mh_adapter; })) {
    result.refused =
        "on ALBERT the adapters library gives a bottleneck after attention what enters the attention block, and takes "
        "the attention's output for the residual";
  } else if (model == "gptj" && any_method<BnConfig>(config, [](const BnConfig& bn) { return bn.output_adapter; })) {
    result.refused =
        "on GPT-J the adapters library adds the attention's output to the residual of the feed-forward block's "
        "bottleneck";
  } else if (is_one_of(model, {"t5", "mt5"}) && has_prefix) {
    result.refused =
        "on T5 the adapters library moves the relative positions of all tokens by the length of the prefix";
  }
  if (!result.refused.empty()) {
    result.refused +=
        ", which torchgraft does not, so that the trained adapter would give other results" + std::string(kAccept);
  }
  if (is_one_of(model, {"distilbert", "bart", "mbart"}) && has_prefix) {
    result.warned =
        "if this prefix was trained with attn_implementation=\"sdpa\", it gives other results here: the adapters "
        "library then " +
        std::string(model == "distilbert" ? "adds 1 to the scores of prefixes"
                                          : "takes prefixes for the first tokens where the decoder's mask is causal") +
        "; with \"eager\" the results are the same";
  } else if (model == "deberta" &&
             any_method<LoRAConfig>(config, [](const auto& lora) { return lora.selfattn_lora; })) {
    result.warned =
        "on DeBERTa (v1) the adapters library adds a random bias to the packed projection under a LoRA, another in "
        "every process; results here have no such bias";
  }
  return result;
}

}  // namespace torchgraft
