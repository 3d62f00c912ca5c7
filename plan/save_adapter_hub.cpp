#include <torchgraft/plan/save_adapter_hub.h>

#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/invertible.h>
#include <torchgraft/plan/library_root.h>
#include <torchgraft/plan/locations.h>
#include <torchgraft/plan/lora_factors.h>
#include <torchgraft/plan/phm.h>
#include <torchgraft/plan/reft_weights.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace torchgraft {
namespace {

using Path = std::vector<std::string>;

std::string joined(const Path& path) { return c10::Join(".", path); }

Path parent(Path path, size_t levels = 1) {
  path.resize(path.size() - std::min(levels, path.size()));
  return path;
}

bool ends_with(const Path& path, const Path& ending) {
  return path.size() >= ending.size() && std::equal(ending.rbegin(), ending.rend(), path.rbegin());
}

bool has_number(const Path& path) { return std::any_of(path.begin(), path.end(), is_number); }

// The path up to its last number, which is the Transformer layer's.
Path layer_path(const Path& path) {
  return Path(path.begin(), std::find_if(path.rbegin(), path.rend(), is_number).base());
}

// The families of the library differ in the names of their containers.
enum class Family { kBert, kT5, kVit, kAlbert, kOther };

// The path of a projection. A model whose paths do not number its layers gets BERT's paths; reading matches those by
// their numbers.
Path projection_path(const Layer& layer, const std::optional<Projection>& projection, const Path& in_bert) {
  const Path path = projection ? split_path(projection->path) : Path();
  if (has_number(path)) {
    return path;
  }
  Path result = {"layer", std::to_string(layer.number)};
  result.insert(result.end(), in_bert.begin(), in_bert.end());
  return result;
}

Path query_path(const Layer& layer) {
  const auto& first = layer.query ? layer.query : layer.key ? layer.key : layer.value;
  return projection_path(layer, first, {layer.kind == AttentionKind::kCross ? "crossattention" : "attention", "query"});
}

Family family_of(const Path& query) {
  const Path attention = parent(query);
  if (ends_with(attention, {"attention", "self"})) {
    return Family::kBert;
  }
  if (ends_with(attention, {"SelfAttention"}) || ends_with(attention, {"EncDecAttention"})) {
    return Family::kT5;
  }
  if (ends_with(attention, {"attention", "attention"})) {
    return Family::kVit;
  }
  const bool albert = std::find(attention.begin(), attention.end(), "albert_layers") != attention.end();
  return albert ? Family::kAlbert : Family::kOther;
}

std::string attention_container(const Layer& layer) {
  const Path query = query_path(layer);
  switch (family_of(query)) {
    case Family::kBert:
      return joined(layer.output ? parent(split_path(layer.output->path)) : parent(query)) + ".adapters";
    case Family::kT5:
      return joined(parent(query, 2)) + ".adapters";
    case Family::kAlbert:
      return joined(parent(query)) + ".attention_adapters.adapters";
    default:
      return joined(layer_path(query)) + (layer.kind == AttentionKind::kCross ? ".cross_attention_adapters.adapters"
                                                                              : ".attention_adapters.adapters");
  }
}

bool is_beit(const std::string& attention_class) { return attention_class.find(".beit.") != std::string::npos; }

std::string output_container(const Layer& layer, bool is_beit) {
  const Path query = query_path(layer);
  const Path out = layer.ffn_out ? split_path(layer.ffn_out->path) : Path();
  switch (out.size() < 2 || is_beit ? Family::kOther : family_of(query)) {
    case Family::kBert:
      return joined(parent(out)) + ".adapters";
    case Family::kT5:
      return joined(parent(out, 2)) + ".adapters";
    case Family::kVit:
      return joined(parent(out)) + ".output_adapters.adapters";
    default:
      return joined(layer_path(query)) + ".output_adapters.adapters";
  }
}

std::string pool_location(const Layer& layer, const std::string& location) {
  const Path query = query_path(layer);
  const auto has = [&](const char* part) { return std::find(query.begin(), query.end(), part) != query.end(); };
  if (location == "self_prefix" && has("q_lin")) {
    return "self";  // DistilBERT
  }
  if (location == "self_prefix" && has("self_attn") && has("encoder")) {
    return has("text_model")     ? "clip_text_model_self_prefix"
           : has("vision_model") ? "clip_vision_model_self_prefix"
                                 : "encoder_prefix";  // BART's or Whisper's encoder alone
  }
  return location;
}

bool is_packed(const std::string& site, const Layer& layer) {
  const auto is_part = [&](const char* end, const std::optional<Projection>& projection) {
    return site.ends_with(end) && projection && projection->packed;
  };
  return is_part("_lora_q", layer.query) || is_part("_lora_k", layer.key) || is_part("_lora_v", layer.value);
}

std::string lora_path(const PlannedModule& module, const Layer& layer) {
  const std::string& site = module.site;
  if (site == "intermediate_lora") {
    return joined(projection_path(layer, layer.ffn_in, {"intermediate", "dense"}));
  }
  if (site == "output_lora") {
    return joined(projection_path(layer, layer.ffn_out, {"output", "dense"}));
  }
  if (const auto position = linear_map_position(site)) {
    return layer.linear_maps.at(*position).path;
  }
  if (site == "gate_lora") {
    return joined(projection_path(layer, layer.ffn_gate, {"intermediate", "gate"}));
  }
  const std::string attention = layer.kind == AttentionKind::kCross ? "crossattention" : "attention";
  if (site.ends_with("_o")) {
    return joined(projection_path(layer, layer.output, {attention, "output", "dense"}));
  }
  if (site.ends_with("_q")) {
    return joined(projection_path(layer, layer.query, {attention, "query"}));
  }
  const bool is_key = site.ends_with("_k");
  return joined(projection_path(layer, is_key ? layer.key : layer.value, {attention, is_key ? "key" : "value"}));
}

// The prefixes of one location.
struct PrefixGroup {
  std::string key;
  std::vector<at::Tensor> layers;  // [P, 2, h, d] each
};

class Writer {
 public:
  Writer(const Plan& plan, const Structure& structure, const AdapterWeights& weights, const Reparametrisation& sources,
         const std::string& name, bool is_beit)
      : plan_(plan),
        structure_(structure),
        weights_(weights),
        sources_(sources),
        name_(name),
        is_beit_(is_beit),
        strips_roots_(are_told_apart_from_root(structure)) {}

  StateDict write() {
    for (size_t i = 0; i < plan_.size(); ++i) {
      const Layer& layer = structure_.layers[structure_.position(plan_[i].layer)];
      layer_ = layer.index;
      if (std::holds_alternative<PlannedLoRA>(plan_[i].method)) {
        write_lora(plan_[i], layer, weights_[i]);
      } else if (const auto* bottleneck = std::get_if<PlannedBottleneck>(&plan_[i].method)) {
        write_bottleneck(plan_[i], *bottleneck, layer, weights_[i]);
      } else if (std::holds_alternative<PlannedInvertible>(plan_[i].method)) {
        write_invertible(layer, weights_[i]);
      } else if (std::holds_alternative<PlannedPrompt>(plan_[i].method)) {
        state_["prompt_tuning.prompt_tunings." + name_ + "." + kSavedPrompt] =
            weights_[i].at("prompt").detach().cpu().contiguous();
      } else if (const auto* reft = std::get_if<PlannedReft>(&plan_[i].method)) {
        write_reft(plan_[i], *reft, layer, weights_[i]);
      } else {
        write_prefix(plan_[i], std::get<PlannedPrefix>(plan_[i].method), layer, weights_[i]);
      }
    }
    write_shared(kSharedPhm);
    write_shared(kSharedVera);
    for (const auto& [pool, group] : groups_) {
      if (const auto mlp = sources_.find(pool); mlp != sources_.end()) {
        write_mlp(group.key, mlp->second);
      } else {
        // [P, L, 2, h, d]: what prefix_of_layer takes apart
        put(group.key + ".control_trans", at::stack(group.layers, 1).flatten());
      }
    }
    return std::move(state_);
  }

 private:
  std::string rooted(const std::string& key) const { return strips_roots_ ? from_library_root(key) : key; }

  void put(const std::string& key, const at::Tensor& tensor) {
    state_[rooted(key)] = tensor.detach().cpu().contiguous();
  }

  // A packed projection is one module of the library: its parameters are those of its parts, concatenated by rows.
  void append(const std::string& key, const at::Tensor& tensor) {
    const auto found = state_.find(rooted(key));
    const auto [written, is_new] = layers_of_keys_.emplace(rooted(key), layer_);
    TORCH_CHECK(is_new || written->second == layer_, "save_adapter: the weights of attentions ", written->second,
                " and ", layer_, " would have one name, ", key,
                ", because the model's paths do not tell these layers apart; ", "please report the model");
    put(key, found == state_.end() ? tensor : at::cat({found->second, tensor.detach().cpu()}, 0));
  }

  void write_gate(const std::string& path, const ModuleWeights& weights) {
    if (weights.count("gate_weight")) {
      append(path + ".weight", weights.at("gate_weight"));
      append(path + ".bias", weights.at("gate_bias"));
    }
  }

  void write_lora(const PlannedModule& module, const Layer& layer, const ModuleWeights& weights) {
    const std::string prefix = lora_path(module, layer) + ".loras." + name_;
    const bool has_factors = has_lora_factors(module, sources_);
    if (has_factors) {
      write_lora_factors(module, layer, prefix);
    }
    if (weights.count("lora_a") && !(has_factors && lora_factors(module) == LoRAFactors::kVera)) {
      append(prefix + ".lora_A", weights.at("lora_a"));
    }
    if (!has_factors) {
      append(prefix + ".lora_B", weights.at("lora_b"));
    }
    if (weights.count("bias")) {
      append(prefix + ".lora_bias", weights.at("bias"));
    }
    if (weights.count("magnitude")) {
      TORCH_CHECK(at::count_nonzero(weights.at("fixed")).item<int64_t>() == 0, "save_adapter: ", module.site,
                  " of layer ", module.number,
                  " is a DoRA of PEFT on a projection with a bias, which PEFT's magnitudes "
                  "do not scale and AdapterHub's do: its directories have no form for it; keep PEFT's directory");
      append(prefix + ".m.weight", weights.at("magnitude").unsqueeze(-1));
    }
    write_gate(prefix + ".gate", weights);
  }

  void write_lora_factors(const PlannedModule& module, const Layer& layer, const std::string& prefix) {
    static const std::map<std::string, std::string> kNames = {{"vera_d", ".vera_D"},
                                                              {"vera_b", ".vera_B"},
                                                              {"task_b", ".lora_B"},
                                                              {"task_values", ".task_specific.values"},
                                                              {"task_weights", ".weights"}};
    TORCH_CHECK(!is_packed(module.site, layer), "save_adapter: ", module.site, " of layer ", module.number,
                " is VeRA or MTL-LoRA on a packed projection of queries, keys and values, for which AdapterHub's "
                "directories have no form; freeze the adapter, which is saved as a LoRA then");
    for (const auto& [name, factor] : sources_.at(lora_factors_key(module))) {
      put(prefix + kNames.at(name), factor);
    }
  }

  void write_bottleneck(const PlannedModule& module, const PlannedBottleneck& bottleneck, const Layer& layer,
                        const ModuleWeights& weights) {
    const bool behind_ffn = module.site == "output_adapter";
    const std::string prefix =
        (behind_ffn ? output_container(layer, is_beit_) : attention_container(layer)) + "." + name_;
    const bool behind_norm = bottleneck.config.ln_before;
    const std::string down = prefix + (behind_norm ? ".adapter_down.1." : ".adapter_down.0.");
    write_projection(module, "down", down, weights);
    write_projection(module, "up", prefix + ".adapter_up.", weights);
    for (const std::string which : {"weight", "bias"}) {
      if (behind_norm) {  // the library saves the norm under two names
        put(prefix + ".adapter_down.0." + which, weights.at("norm_before_" + which));
        put(prefix + ".adapter_norm_before." + which, weights.at("norm_before_" + which));
      }
      if (bottleneck.config.ln_after) {
        put(prefix + ".adapter_norm_after." + which, weights.at("norm_after_" + which));
      }
    }
    if (std::holds_alternative<std::string>(bottleneck.config.scaling)) {
      put(prefix + ".scaling", weights.at("scaling"));
    }
    write_gate(prefix + ".gate", weights);
  }

  // One projection of a bottleneck, at `path`; as factors if `sources` has them.
  void write_projection(const PlannedModule& module, const std::string& side, const std::string& path,
                        const ModuleWeights& weights) {
    if (!has_phm_factors(module, sources_)) {
      put(path + "weight", weights.at(side + "_weight"));
      put(path + "bias", weights.at(side + "_bias"));
      return;
    }
    if (std::get<PlannedBottleneck>(module.method).config.phm_bias) {
      put(path + "b", weights.at(side + "_bias"));
    }
    const auto own = sources_.find(phm_place(module, side, "", /*shared=*/false).source);
    for (const auto& [name, factor] : own == sources_.end() ? ModuleWeights() : own->second) {
      if (name.starts_with(side + "_")) {
        put(path + name.substr(side.size() + 1), factor);
      }
    }
  }

  void write_shared(const char* source) {
    const auto shared = sources_.find(source);
    for (const auto& [name, factor] : shared == sources_.end() ? ModuleWeights() : shared->second) {
      state_["shared_parameters." + name_ + "." + name] = factor.detach().cpu().contiguous();
    }
  }

  // In an encoder that is a part of a model the block is the encoder's.
  void write_invertible(const Layer& layer, const ModuleWeights& weights) {
    const Path query = query_path(layer);
    const auto has = [&](const char* part) { return std::find(query.begin(), query.end(), part) != query.end(); };
    const bool is_part = layer.kind == AttentionKind::kEncoder ||
                         (has("encoder") && !has("text_model") && (has("self_attn") || has("SelfAttention")));
    const std::string root = is_part ? "encoder." : has("text_model") ? "text_model." : "";
    for (const auto& [name, weight] : weights) {
      state_[root + "invertible_adapters." + name_ + "." + invertible_names().at(name)] =
          weight.detach().cpu().contiguous();
    }
  }

  void write_reft(const PlannedModule& module, const PlannedReft& reft, const Layer& layer,
                  const ModuleWeights& weights) {
    const Path query = query_path(layer);
    const Path whole = parent(layer_path(query), family_of(query) == Family::kT5 ? 2 : 0);
    const auto sources = sources_.find(reft_source(module));
    const ModuleWeights own = sources == sources_.end() ? ModuleWeights() : sources->second;
    for (const auto& [name, tensor] : reft_state(reft, weights, own)) {
      put(joined(whole) + ".reft_layer.refts." + name_ + "." + name, tensor);
    }
  }

  void write_mlp(const std::string& path, const ModuleWeights& mlp) {
    put(path + ".wte.weight", mlp.at("embeddings"));
    for (const std::string which : {"weight", "bias"}) {
      put(path + ".control_trans.0." + which, mlp.at("down_" + which));
      put(path + ".control_trans.2." + which, mlp.at("up_" + which));
    }
  }

  void write_prefix(const PlannedModule& module, const PlannedPrefix& prefix, const Layer& layer,
                    const ModuleWeights& weights) {
    // Where a list holds the queries of all layers ("queries.0"), the last number is the layer's.
    const Path query = query_path(layer);
    const std::string place = joined(is_number(query.back()) ? query : parent(query)) + ".prefix_tuning";
    const std::string location = pool_location(layer, module.location);
    PrefixGroup& group = groups_[prefix.pool];
    if (group.key.empty()) {
      // Every layer of the library holds the pool; we write the first layer's.
      group.key = place + ".pool.prefix_tunings." + name_ + "." + location;
      group.layers.resize(prefix.group_size);
    }
    // [h, P, d] each -> [P, 2, h, d]
    const auto by_position = [&](const char* which) { return weights.at(which).detach().cpu().transpose(0, 1); };
    group.layers.at(prefix.group_index) = at::stack({by_position("prefix_key"), by_position("prefix_value")}, 1);
    write_gate(place + ".prefix_gates." + name_, weights);
  }

  const Plan& plan_;
  const Structure& structure_;
  const AdapterWeights& weights_;
  const Reparametrisation& sources_;
  std::string name_;
  bool is_beit_;
  bool strips_roots_;
  int64_t layer_ = 0;  // whose weights are written
  std::map<std::string, int64_t> layers_of_keys_;
  StateDict state_;
  std::map<std::string, PrefixGroup> groups_;  // by pool
};

}  // namespace

std::string bottleneck_container(const std::string& site, const Layer& layer, const std::string& attention_class) {
  return site == "output_adapter" ? output_container(layer, is_beit(attention_class)) : attention_container(layer);
}

StateDict adapter_hub_state(const Plan& plan, const Structure& structure, const AdapterWeights& weights,
                            const Reparametrisation& sources, const std::string& name,
                            const std::string& attention_class) {
  at::NoGradGuard no_grad;
  return Writer(plan, structure, weights, sources, name, is_beit(attention_class)).write();
}

}  // namespace torchgraft
