#include <torchgraft/plan/checkpoint_part.h>

#include <torchgraft/plan/saved_paths.h>

#include <c10/util/Exception.h>

#include <algorithm>

namespace torchgraft {
namespace {

// Whether there is cross attention, and no encoder before it.
bool is_decoder_alone(const Structure& structure) {
  const auto any = [&](AttentionKind kind) {
    return std::any_of(structure.layers.begin(), structure.layers.end(),
                       [&](const Layer& layer) { return layer.kind == kind; });
  };
  return any(AttentionKind::kCross) && !any(AttentionKind::kEncoder);
}

bool is_encoder_alone(const Structure& structure) {
  return std::all_of(structure.layers.begin(), structure.layers.end(),
                     [](const Layer& layer) { return layer.kind == AttentionKind::kEncoder; });
}

bool has_self_attention_alone(const Structure& structure) {
  return std::all_of(structure.layers.begin(), structure.layers.end(),
                     [](const Layer& layer) { return layer.kind == AttentionKind::kSelf; });
}

bool reads_filled_caches(const Structure& structure) {
  return std::all_of(structure.layers.begin(), structure.layers.end(), [](const Layer& layer) {
    return layer.kind != AttentionKind::kCross || layer.cache == CacheKind::kFilled;
  });
}

// Whether the path leads through `part` ("encoder", "decoder") to a layer's number: "model.encoder.layers.0". The first
// of the two counts: "decoder.bert.encoder.layer.0" is the decoder's.
bool is_in(const SavedModule& saved, const std::string& part) {
  for (const std::string& component : saved.path) {
    if (is_number(component)) {
      return false;
    }
    if (component == "encoder" || component == "decoder") {
      return component == part;
    }
  }
  return false;
}

bool is_of_filled_cache(const SavedModule& saved) {
  const std::vector<std::string> sites =
      saved.kind == SavedKind::kLoRA ? lora_sites(saved.path) : std::vector<std::string>();
  return !sites.empty() && std::all_of(sites.begin(), sites.end(), [](const std::string& site) {
    return site == "crossattn_lora_k" || site == "crossattn_lora_v";
  });
}

bool names_layers(const PlannedModule& module) {
  return std::visit(
      [](const auto& planned) {
        using Config = std::decay_t<decltype(planned.config)>;
        bool by_layer = false;
        if constexpr (std::is_same_v<Config, BnConfig>) {
          by_layer = !std::holds_alternative<double>(planned.config.reduction_factor);
        }
        if constexpr (std::is_same_v<Config, PromptTuningConfig>) {
          return false;
        } else if constexpr (std::is_same_v<Config, ReftConfig>) {
          return !std::holds_alternative<std::string>(planned.config.layers);
        } else {
          return by_layer || !planned.config.leave_out.empty();
        }
      },
      module.method);
}

}  // namespace

void keep_part_of_model(Checkpoint& checkpoint, const Plan& plan, const Structure& structure) {
  auto& modules = checkpoint.modules;
  const auto is_in_decoder = [](const SavedModule& saved) { return is_in(saved, "decoder"); };
  const auto is_in_encoder = [](const SavedModule& saved) { return is_in(saved, "encoder"); };
  if (is_encoder_alone(structure)) {
    std::erase_if(modules, is_in_decoder);
    checkpoint.prefixes.erase("self_prefix");
    checkpoint.prefixes.erase("cross_prefix");
    return;
  }
  const bool is_of_both =
      (std::any_of(modules.begin(), modules.end(), is_in_encoder) || checkpoint.prefixes.count("encoder_prefix") > 0) &&
      (std::any_of(modules.begin(), modules.end(), is_in_decoder) || checkpoint.prefixes.count("cross_prefix") > 0);
  TORCH_CHECK(
      !has_self_attention_alone(structure) || !is_of_both,
      "adapter weights: the adapter is of an encoder and a decoder, and the model has no cross attention; if it ",
      "is the encoder alone, say so: part=\"encoder\" (torchgraft add --part encoder)");
  if (!is_decoder_alone(structure)) {
    return;
  }
  bool has_encoder = checkpoint.prefixes.erase("encoder_prefix") > 0;
  if (std::any_of(modules.begin(), modules.end(), is_in_decoder)) {  // else "encoder" is the stack's name, as in BERT
    has_encoder = std::erase_if(modules, is_in_encoder) > 0 || has_encoder;
  }
  TORCH_CHECK(
      !has_encoder || std::none_of(plan.begin(), plan.end(), names_layers),
      "adapter weights: the adapter is of an encoder and a decoder, and its leave_out or reduction_factor names "
      "layers by numbers that count the encoder's; the model is the decoder alone: graft a file that holds both");
  if (reads_filled_caches(structure)) {
    std::erase_if(modules, is_of_filled_cache);
  }
}

}  // namespace torchgraft
