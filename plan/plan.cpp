#include <torchgraft/plan/plan.h>

#include <torchgraft/plan/library_layers.h>
#include <torchgraft/plan/locations.h>
#include <torchgraft/plan/lora_factors.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <iterator>
#include <map>
#include <set>

namespace torchgraft {

double lora_scaling(const LoRAConfig& config) {
  return config.use_gating ? 1.0 : config.alpha / static_cast<double>(config.r);
}

LoRAForm lora_form(const LoRAConfig& config) {
  return config.composition_mode == "scale" ? LoRAForm::kScale : config.use_dora ? LoRAForm::kDora : LoRAForm::kAdd;
}

int64_t prompt_begin(const PromptTuningConfig& config) { return config.combine == "prefix_after_bos" ? 1 : 0; }

std::vector<std::string> own_norms(const BnConfig& config) {
  std::vector<std::string> result;
  if (config.ln_before) {
    result.emplace_back("norm_before");
  }
  if (config.ln_after) {
    result.emplace_back("norm_after");
  }
  return result;
}

namespace {

bool contains(const std::vector<int64_t>& values, int64_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

std::string listed(const std::vector<int64_t>& layers) {
  std::string result;
  for (const int64_t layer : layers) {
    result += (result.empty() ? "" : ", ") + std::to_string(layer);
  }
  return result;
}

// The attentions that have modules of their own.
std::vector<Layer> first_runs(const Structure& structure) {
  std::vector<Layer> result;
  std::copy_if(structure.layers.begin(), structure.layers.end(), std::back_inserter(result),
               [](const Layer& layer) { return !layer.shares; });
  return result;
}

double reduction_factor(const BnConfig& config, int64_t layer) {
  if (const auto* factor = std::get_if<double>(&config.reduction_factor)) {
    return *factor;
  }
  const auto& by_layer = std::get<std::map<std::string, double>>(config.reduction_factor);
  for (const std::string& key : {std::to_string(layer), std::string("default")}) {
    if (const auto found = by_layer.find(key); found != by_layer.end()) {
      return found->second;
    }
  }
  TORCH_CHECK(false, "plan: reduction_factor names neither layer ", layer,
              " nor a default; give one, e.g. {\"1\": 8, \"default\": 16}");
}

// Python's `hidden // factor`, which the shapes of saved adapters follow: with a fractional factor it is not always the
// floor of the rounded quotient (48 // 0.1 is 479).
int64_t floor_divide(int64_t hidden, double factor) {
  constexpr double kLargest = 1 << 30;  // far beyond any memory; a cast of a double beyond int64 is undefined
  const auto dividend = static_cast<double>(hidden);
  const double quotient = (dividend - std::fmod(dividend, factor)) / factor;  // a whole number, up to rounding
  TORCH_CHECK(quotient <= kLargest, "plan: reduction_factor ", factor, " of ", hidden,
              " hidden features makes a bottleneck of ", quotient, "; expected at most ", kLargest,
              ": give a larger reduction_factor");
  return static_cast<int64_t>(std::round(quotient));
}

class Planner {
 public:
  Planner(const Structure& structure, const AdapterConfig& config)
      : structure_(structure),
        wired_for_(config.wired_for),
        inverts_output_(config.inverts_output),
        layers_(first_runs(structure)) {}

  void add(const BnConfig& config);
  void add(const PrefixTuningConfig& config);
  void add(const LoRAConfig& config);
  void add(const ReftConfig& config);
  void add(const PromptTuningConfig& config);
  Plan finish();

 private:
  // Whether `layer` has the location, and the config does not leave the layer out. Notes a layer that lacks it. The
  // second function is for locations of the feed-forward block, which the two attentions of a decoder layer share.
  bool has_location(const Layer& layer, const std::string& location, bool present,
                    const std::vector<int64_t>& leave_out);
  bool has_feed_forward_location(const Layer& layer, const std::string& location, bool present,
                                 const std::vector<int64_t>& leave_out);
  // The number that leave_out and reduction_factor mean: the library counts an EncoderDecoderModel's decoder from 0
  // again.
  int64_t counted(const Layer& layer) const;
  bool neighbour_has_feed_forward(const Layer& layer) const;
  void add_invertible(const BnConfig& config);
  void add_module(const Layer& layer, const std::string& location, const std::string& site, PlannedMethod method);

  const Structure& structure_;
  const std::string wired_for_;
  const bool inverts_output_;
  const std::vector<Layer> layers_;  // without those that run again
  Plan plan_;
  std::map<std::string, std::vector<int64_t>> lacking_;
  std::set<std::pair<int64_t, std::string>> taken_;
  std::set<std::string> prefixed_;  // pools
  bool shares_phm_ = false;
};

bool Planner::has_location(const Layer& layer, const std::string& location, bool present,
                           const std::vector<int64_t>& leave_out) {
  if (contains(leave_out, counted(layer))) {
    return false;
  }
  if (!present && !contains(lacking_[location], layer.number)) {  // q, k and v share a location
    lacking_[location].push_back(layer.number);
  }
  return present;
}

int64_t Planner::counted(const Layer& layer) const {
  if (wired_for_ != "encoder-decoder" || layer.kind == AttentionKind::kEncoder) {
    return layer.number;
  }
  int64_t encoders = 0;
  for (const Layer& other : layers_) {
    encoders = other.kind == AttentionKind::kEncoder ? std::max(encoders, other.number + 1) : encoders;
  }
  return layer.number - encoders;
}

// The two attentions of a decoder layer share one feed-forward block, which follows one of them.
bool Planner::neighbour_has_feed_forward(const Layer& layer) const {
  return std::any_of(structure_.layers.begin(), structure_.layers.end(), [&](const Layer& other) {
    return other.number == layer.number && other.index != layer.index && (other.ffn_in || other.has_ffn_residual);
  });
}

bool Planner::has_feed_forward_location(const Layer& layer, const std::string& location, bool present,
                                        const std::vector<int64_t>& leave_out) {
  return (present || !neighbour_has_feed_forward(layer)) && has_location(layer, location, present, leave_out);
}

void Planner::add_module(const Layer& layer, const std::string& location, const std::string& site,
                         PlannedMethod method) {
  TORCH_CHECK(taken_.emplace(layer.index, site).second, "plan: two configs of the union claim ", location, " of layer ",
              layer.number, "; use leave_out to give each its own layers");
  plan_.push_back({layer.index, layer.number, location, site, std::move(method)});
}

void Planner::add(const BnConfig& config) {
  if (config.phm_layer && (config.shared_W_phm || config.shared_phm_rule)) {
    TORCH_CHECK(!shares_phm_,
                "plan: two Compacter configs of the union share factors (shared_W_phm, shared_phm_rule), "
                "which are one set for the whole adapter; let at most one share them");
    shares_phm_ = true;
  }
  add_invertible(config);
  for (const Layer& layer : layers_) {
    const auto bottleneck = [&](BottleneckWiring wiring = BottleneckWiring::kDefined) {
      const int64_t size = floor_divide(layer.hidden_size, reduction_factor(config, counted(layer)));
      return PlannedBottleneck{config, layer.hidden_size, std::max<int64_t>(1, size), wiring};
    };
    const bool cross = layer.kind == AttentionKind::kCross;
    const std::string location = attention_adapter_location(layer);
    // In an EncoderDecoderModel of BERTs the library has mh_adapter after cross attention, too, and no cross_adapter.
    const bool wanted = cross && wired_for_ != "encoder-decoder" ? config.cross_adapter : config.mh_adapter;
    if (wanted && has_location(layer, location, layer.has_attention_residual, config.leave_out)) {
      add_module(
          layer, location, location,
          bottleneck(wired_for_ == "albert" && !cross ? BottleneckWiring::kExchanged : BottleneckWiring::kDefined));
    }
    if (config.output_adapter &&
        has_feed_forward_location(layer, "output_adapter", layer.has_ffn_residual, config.leave_out)) {
      add_module(layer, "output_adapter", "output_adapter",
                 bottleneck(wired_for_ == "gptj" ? BottleneckWiring::kAfterOthers : BottleneckWiring::kDefined));
    }
  }
}

// leave_out does not count: the embeddings are no layer's.
void Planner::add_invertible(const BnConfig& config) {
  if (!config.inv_adapter) {
    return;
  }
  const int64_t size = structure_.embedding_size;
  TORCH_CHECK(size > 0, "plan: the model has no inv_adapter: ", structure_.embedding_note,
              "; use a configuration without inv_adapter");
  TORCH_CHECK(!inverts_output_ || structure_.several_outputs.empty(),
              "plan: the inverse of inv_adapter stands before the output embeddings, and the model has several linear "
              "maps to the vocabulary, of which they are one: ",
              structure_.several_outputs,
              "; use a configuration without inv_adapter (or, for a trained adapter without an inverse, add "
              "\"inverts_output\": false to its adapter_config.json)");
  const int64_t first = size / 2;
  const double factor = config.inv_adapter_reduction_factor.value();
  add_module(layers_.front(), "inv_adapter", "inv_adapter",
             PlannedInvertible{config, size, floor_divide(size - first, factor), floor_divide(first, factor),
                               inverts_output_ && structure_.has_output_embeddings});
}

void Planner::add(const PrefixTuningConfig& config) {
  std::map<std::string, std::vector<const Layer*>> groups;  // layers that share a prefix MLP, by its pool
  for (const Layer& layer : layers_) {
    const bool wanted = layer.kind == AttentionKind::kSelf ||
                        (layer.kind == AttentionKind::kEncoder ? config.encoder_prefix : config.cross_prefix);
    if (wanted && has_location(layer, prefix_location(layer), layer.has_core, config.leave_out)) {
      groups[prefix_pool(structure_, layer)].push_back(&layer);
    }
  }
  for (const auto& [pool, layers] : groups) {
    const std::string location = prefix_location(*layers.front());
    TORCH_CHECK(prefixed_.insert(pool).second, "plan: two prefix configs of the union claim ", location,
                "; the layers of a location share the MLP that makes their prefixes, so give one config all of them");
    const auto size = static_cast<int64_t>(layers.size());
    for (int64_t i = 0; i < size; ++i) {
      const Layer& layer = *layers[i];
      add_module(layer, location, location,
                 PlannedPrefix{config, pool, layer.hidden_size, layer.num_kv_heads, layer.head_dim, i, size});
    }
  }
}

// A table's row is not multiplied by what the row holds: there is nothing for a gate to read.
bool acts_on_embeddings(const LoRAConfig& config) {
  return lora_form(config) == LoRAForm::kAdd && !config.use_gating && !config.lora_bias && !config.mtl_lora &&
         !config.vera_d && !config.vera_b;
}

void Planner::add(const LoRAConfig& config) {
  for (const std::string& path : config.linear_maps) {
    const bool known = std::any_of(layers_.begin(), layers_.end(), [&](const Layer& layer) {
      return std::any_of(layer.linear_maps.begin(), layer.linear_maps.end(),
                         [&](const Projection& linear) { return linear.path == path; });
    });
    TORCH_CHECK(known, "plan: the model has no linear map ", path,
                " outside of its layers that a LoRA can be on; inspect() lists them under \"linear_maps\"");
  }
  for (const Layer& layer : layers_) {
    const auto add_lora = [&](const std::string& location, const std::string& site, const Projection& projection) {
      add_module(layer, location, site, PlannedLoRA{config, projection.in_features, projection.out_features});
    };
    const auto wants = [&](const std::string& matrix) {
      if (matrix == "o") {
        return config.attn_output_lora;
      }
      if (layer.cache == CacheKind::kFilled && matrix != "q") {  // the pass that fills the cache has it
        return false;
      }
      const auto& matrices = config.attn_matrices;
      return config.selfattn_lora && std::find(matrices.begin(), matrices.end(), matrix) != matrices.end();
    };
    for (const auto& [matrix, projection] : {std::pair("q", &layer.query), std::pair("k", &layer.key),
                                             std::pair("v", &layer.value), std::pair("o", &layer.output)}) {
      if (wants(matrix) && has_location(layer, "selfattn_lora", projection->has_value(), config.leave_out)) {
        const bool cross = layer.kind == AttentionKind::kCross;
        add_lora("selfattn_lora", std::string(cross ? "crossattn_lora_" : "selfattn_lora_") + matrix, **projection);
      }
    }
    for (size_t i = 0; i < layer.linear_maps.size(); ++i) {
      const Projection& linear = layer.linear_maps[i];
      if (std::find(config.linear_maps.begin(), config.linear_maps.end(), linear.path) != config.linear_maps.end()) {
        TORCH_CHECK(!linear.is_embedding || acts_on_embeddings(config), "plan: on the embedding ", linear.path,
                    " a LoRA can be that adds B A, without gates, biases, magnitudes and shared factors");
        add_lora("linear_lora", std::string(kLinearMapSite) + std::to_string(i), linear);
      }
    }
    if (config.gate_lora &&
        has_feed_forward_location(layer, "gate_lora", layer.ffn_gate.has_value(), config.leave_out)) {
      add_lora("gate_lora", "gate_lora", *layer.ffn_gate);
    }
    if (config.intermediate_lora &&
        has_feed_forward_location(layer, "intermediate_lora", layer.ffn_in.has_value(), config.leave_out)) {
      add_lora("intermediate_lora", "intermediate_lora", *layer.ffn_in);
    }
    if (config.output_lora &&
        has_feed_forward_location(layer, "output_lora", layer.ffn_out.has_value(), config.leave_out)) {
      add_lora("output_lora", "output_lora", *layer.ffn_out);
    }
  }
}

void Planner::add(const ReftConfig& config) {
  for (const Layer& layer : layers_) {
    if (!acts_on(config, layer.number)) {
      continue;
    }
    TORCH_CHECK(layer.has_end, "plan: ReFT cannot act on layer ", layer.number, ": ",
                layer.end_note.empty() ? "the end of the layer is not known" : layer.end_note,
                "; leave the layer out of the config's layers, or use another method");
    add_module(layer, "output_reft", "output_reft", PlannedReft{config, layer.hidden_size});
  }
}

void Planner::add(const PromptTuningConfig& config) {
  TORCH_CHECK(structure_.embedding_size > 0,
              "plan: the model has no place for prompt_tuning: ", structure_.embedding_note,
              "; train prefix_tuning instead");
  add_module(layers_.front(), "prompt_tuning", "prompt_tuning", PlannedPrompt{config, structure_.embedding_size});
}

// What was not found in these layers, each note once: those of other layers differ in the numbers of their paths.
std::string notes_of(const Structure& structure, const std::set<int64_t>& numbers) {
  std::vector<std::string> notes;
  std::map<std::string, std::set<int64_t>> layers;  // by the note without numbers
  const auto key_of = [](const std::string& note) {
    std::string key;
    std::copy_if(note.begin(), note.end(), std::back_inserter(key), [](unsigned char c) { return !std::isdigit(c); });
    return key;
  };
  for (const Layer& layer : structure.layers) {
    for (const std::string& note : numbers.count(layer.number) ? layer.notes : std::vector<std::string>()) {
      std::set<int64_t>& with_it = layers[key_of(note)];
      if (with_it.empty()) {
        notes.push_back(note);
      }
      with_it.insert(layer.number);
    }
  }
  std::string text;
  for (const std::string& note : notes) {
    const std::set<int64_t>& with_it = layers.at(key_of(note));
    text += (with_it.size() > 1 ? "; layers " : "; layer ") + c10::Join(", ", with_it) + ": " + note;
  }
  return text;
}

Plan Planner::finish() {
  for (const auto& [location, layers] : lacking_) {
    TORCH_CHECK(false, "plan: the model has no ", location, " in layers ", listed(layers),
                "; add them to the config's leave_out, or do not ask for this location",
                notes_of(structure_, {layers.begin(), layers.end()}));
  }
  TORCH_CHECK(!plan_.empty(), "plan: the config asks for nothing on this model");
  check_vera_shapes(plan_);
  const auto rank = [](const PlannedModule& module) { return std::pair(module.layer, execution_order(module.site)); };
  std::stable_sort(plan_.begin(), plan_.end(),
                   [&](const PlannedModule& a, const PlannedModule& b) { return rank(a) < rank(b); });
  return std::move(plan_);
}

}  // namespace

Plan make_plan(const Structure& structure, const AdapterConfig& config) {
  TORCH_CHECK(!structure.layers.empty(), "plan: the model has no attention layer");
  const AdapterConfig numbered = numbered_as_found(config, structure);
  Planner planner(structure, numbered);
  for (const MethodConfig& method : numbered.methods) {
    std::visit([&](const auto& held) { planner.add(held); }, method);
  }
  return planner.finish();
}

}  // namespace torchgraft
