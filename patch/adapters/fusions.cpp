#include <torchgraft/patch/adapters/fusions.h>

#include <torchgraft/patch/adapters/adapter.h>
#include <torchgraft/plan/checkpoint.h>
#include <torchgraft/plan/draws.h>
#include <torchgraft/plan/match_modules.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/save_adapter_hub.h>
#include <torchgraft/registration/parse_json.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <charconv>
#include <string_view>
#include <system_error>

namespace torchgraft {

using torch::jit::Module;

namespace {

constexpr const char* kContainer = "adapter_fusion_layer";

// The library's name of a weight, "query.weight", by ours.
const std::map<std::string, std::string>& fusion_weight_names() {
  static const std::map<std::string, std::string> kNames = {
      {"query.weight", "query_weight"}, {"query.bias", "query_bias"},     {"key.weight", "key_weight"},
      {"key.bias", "key_bias"},         {"value.weight", "value_weight"}, {"dense.weight", "dense_weight"},
      {"dense.bias", "dense_bias"}};
  return kNames;
}

// The layers of a fusion as modules of a checkpoint: they stand where the bottlenecks of a layer stand.
Checkpoint fusion_checkpoint(const StateDict& state, const std::string& name) {
  const std::string begin = std::string(kContainer) + "." + name;
  const std::string container = begin + ".";
  std::map<std::string, SavedModule> modules;  // by path
  for (const auto& [key, tensor] : state) {
    const size_t at = key.find(container);
    if (at == std::string::npos && key.find(begin) != std::string::npos) {
      continue;  // of "a,b,c" or "a,bc": the library saves them with "a,b", since their names begin so
    }
    TORCH_CHECK(at != std::string::npos && at > 0, "adapter fusion: the key ", key, " is no weight of the fusion '",
                name, "'");
    const auto known = fusion_weight_names().find(key.substr(at + container.size()));
    TORCH_CHECK(known != fusion_weight_names().end(), "adapter fusion: the key ", key,
                " is no weight that AdapterFusion has");
    const std::string path = key.substr(0, at - 1);
    SavedModule& module =
        modules.try_emplace(path, SavedModule{SavedKind::kBottleneck, split_path(path), {}}).first->second;
    module.parameters[known->second] = {key, tensor};
  }
  Checkpoint result;
  for (auto& [path, module] : modules) {
    result.modules.push_back(std::move(module));
  }
  return result;
}

// The inverse of fusion_layer_name.
std::pair<int64_t, std::string> place_of(const std::string& layer) {
  constexpr std::string_view kBegin = "layer_";
  int64_t number = 0;
  const char* end = layer.data() + layer.size();
  const bool begins = layer.starts_with(kBegin);
  const auto [behind, fault] = std::from_chars(layer.data() + (begins ? kBegin.size() : layer.size()), end, number);
  TORCH_CHECK(fault == std::errc() && behind != end && *behind == '_', "adapter fusion: ", shown_text(layer),
              " is no layer: the module is damaged");
  return {number, std::string(behind + 1, end)};
}

// All residual sites that the structure has.
Plan residual_plan(const Structure& structure) {
  Plan plan;
  for (const Layer& layer : structure.layers) {
    const auto add = [&](const std::string& site) {
      PlannedBottleneck planned;
      planned.hidden_size = layer.hidden_size;
      plan.push_back({layer.index, layer.number, site, site, planned});
    };
    if (layer.shares) {
      continue;
    }
    if (layer.has_attention_residual) {
      add(layer.kind == AttentionKind::kCross ? "cross_adapter" : "mh_adapter");
    }
    if (layer.has_ffn_residual) {
      add("output_adapter");
    }
  }
  return plan;
}

// The two numbers of BertFusion: off the diagonal of a fresh value matrix, and init_bert_weights' deviation.
constexpr double kOffDiagonal = 1e-6;
constexpr double kFusionStd = 0.02;

// As BertFusion's constructor draws: each torch.nn.Linear first its defaults, then init_bert_weights.
ModuleWeights fresh_layer(const FusionConfig& config, int64_t hidden, const at::TensorOptions& options) {
  const at::NoGradGuard no_grad;
  ModuleWeights weights;
  const auto draw = [&](const std::string& part, bool has_bias) {
    linear_weight(hidden, hidden);
    if (has_bias) {
      linear_bias(hidden, hidden);
      weights[part + "_bias"] = at::zeros({hidden}, options);
    }
    weights[part + "_weight"] = at::empty({hidden, hidden}).normal_(0.0, kFusionStd).to(options);
  };
  if (!config.query && !config.key && !config.value) {
    weights["dense_weight"] = linear_weight(1, hidden).to(options);
    weights["dense_bias"] = linear_bias(1, hidden).to(options);
  }
  if (config.query) {
    draw("query", /*has_bias=*/true);
  }
  if (config.key) {
    draw("key", /*has_bias=*/true);
  }
  if (config.value) {
    draw("value", /*has_bias=*/false);
    if (config.value_initialized) {
      weights["value_weight"] = at::full({hidden, hidden}, kOffDiagonal).fill_diagonal_(1.0).to(options);
    }
  }
  return weights;
}

}  // namespace

AdapterFusion fresh_fusion(const FusionConfig& config, const std::set<std::string>& sites, const Structure& structure,
                           const at::TensorOptions& options) {
  AdapterFusion result{config};
  for (const PlannedModule& module : residual_plan(structure)) {
    if (sites.count(module.site)) {
      const int64_t hidden = std::get<PlannedBottleneck>(module.method).hidden_size;
      result.weights[{module.number, module.site}] = fresh_layer(config, hidden, options);
    }
  }
  return result;
}

void check_can_train(const FusionConfig& config, const char* what) {
  TORCH_CHECK(config.query || config.key || config.value, what, ": the AdapterFusion layers '", config.name,
              "' have neither query nor key nor value (fields of their configuration), so that there is nothing to ",
              "train; make others");
}

std::map<std::string, std::vector<int64_t>> fusion_shapes(const FusionConfig& config, int64_t hidden) {
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& [part, is_there] : {std::pair("query", config.query), std::pair("key", config.key)}) {
    if (is_there) {
      shapes[std::string(part) + "_weight"] = {hidden, hidden};
      shapes[std::string(part) + "_bias"] = {hidden};
    }
  }
  if (config.value) {
    shapes["value_weight"] = {hidden, hidden};
  }
  if (shapes.empty()) {  // they say where the layers are
    shapes["dense_weight"] = {1, hidden};
    shapes["dense_bias"] = {1};
  }
  return shapes;
}

bool is_unused(const std::string& weight) { return weight.starts_with("dense_"); }

AdapterFusion read_fusion(const FusionConfig& config, const StateDict& state, const Structure& structure,
                          const at::TensorOptions& options) {
  const Plan plan = residual_plan(structure);
  const Checkpoint checkpoint = fusion_checkpoint(state, config.name);
  const std::vector<SavedParameters> matched = match_modules(checkpoint, plan, structure);
  AdapterFusion result{config};
  for (size_t i = 0; i < plan.size(); ++i) {
    if (matched[i].empty()) {
      continue;
    }
    const std::string place = plan[i].site + " of layer " + std::to_string(plan[i].number);
    const auto shapes = fusion_shapes(config, std::get<PlannedBottleneck>(plan[i].method).hidden_size);
    ModuleWeights& weights = result.weights[{plan[i].number, plan[i].site}];
    for (const auto& [name, shape] : shapes) {
      const auto found = matched[i].find(name);
      TORCH_CHECK(found != matched[i].end(), "adapter fusion: ", name, " of ", place, " is missing in the checkpoint");
      const at::Tensor& tensor = found->second.tensor;
      TORCH_CHECK(tensor.sizes() == at::IntArrayRef(shape) && tensor.is_floating_point(), "adapter fusion: expected ",
                  found->second.key, " of shape ", shape, " and of a floating-point type, got ", tensor.sizes(), " of ",
                  tensor.scalar_type());
      weights[name] = tensor.detach().to(options, /*non_blocking=*/false, /*copy=*/true);
    }
    for (const auto& [name, saved] : matched[i]) {
      TORCH_CHECK(shapes.count(name), "adapter fusion: the checkpoint has ", saved.key,
                  ", which the configuration switches off");
    }
  }
  TORCH_CHECK(!result.weights.empty(), "adapter fusion: the checkpoint has no weights of '", config.name, "'");
  return result;
}

StateDict fusion_state(const AdapterFusion& fusion, const Structure& structure, const std::string& attention_class) {
  StateDict state;
  for (const PlannedModule& module : residual_plan(structure)) {
    const auto found = fusion.weights.find({module.number, module.site});
    if (found == fusion.weights.end()) {
      continue;
    }
    const Layer& layer = structure.layers.at(structure.position(module.layer));
    const std::string container = bottleneck_container(module.site, layer, attention_class);
    const std::string path = container.substr(0, container.rfind('.') + 1) + kContainer + "." + fusion.name() + ".";
    for (const auto& [saved, own] : fusion_weight_names()) {
      if (const auto weight = found->second.find(own); weight != found->second.end()) {
        state[path + saved] = weight->second.detach().cpu();
      }
    }
  }
  return state;
}

std::string fusion_module_name(const std::string& fusion) { return "fusion_" + attribute_text(fusion) + "_weights"; }

std::string fusion_layer_name(int64_t number, const std::string& site) {
  return "layer_" + std::to_string(number) + "_" + site;
}

bool is_trainable_fusion(const Module& adapters_module, const std::string& fusion) {
  const std::string name = fusion_module_name(fusion);
  return adapters_module.hasattr(name) && adapters_module.attr(name).toModule().parameters().size() > 0;
}

std::vector<AdapterFusion> read_fusions(const Module& adapters_module) {
  std::vector<AdapterFusion> result;
  if (!adapters_module.hasattr("fusions")) {
    return result;
  }
  for (const c10::IValue& json : adapters_module.attr("fusions").toListRef()) {
    AdapterFusion fusion{fusion_config_from_json(json.toStringRef())};
    const Module held = adapters_module.attr(fusion_module_name(fusion.name())).toModule();
    for (const auto& layer : held.named_children()) {
      ModuleWeights& weights = fusion.weights[place_of(layer.name)];
      for (const auto& buffer : layer.value.named_buffers(/*recurse=*/false)) {
        weights[buffer.name] = buffer.value.detach().clone();
      }
      for (const auto& parameter : layer.value.named_parameters(/*recurse=*/false)) {
        weights[parameter.name] = parameter.value.detach().clone();
      }
    }
    fusion.trainable = is_trainable_fusion(adapters_module, fusion.name());
    result.push_back(std::move(fusion));
  }
  return result;
}

void register_fusions(Module& adapters_module, const std::vector<AdapterFusion>& fusions,
                      const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
  if (fusions.empty()) {
    return;
  }
  const auto make = [&](const char* name) {
    Module module(c10::QualifiedName(std::string("__torch__.torchgraft.") + name), unit, /*shouldMangle=*/true);
    module.register_attribute("training", c10::BoolType::get(), false);
    return module;
  };
  c10::List<std::string> configs;
  for (const AdapterFusion& fusion : fusions) {
    configs.push_back(fusion_config_to_json(fusion.config));
    Module held = make("AdapterFusion");
    for (const auto& [place, weights] : fusion.weights) {
      Module layer = make("AdapterFusionLayer");
      for (const auto& [name, tensor] : weights) {
        layer.register_parameter(name, tensor.detach().set_requires_grad(fusion.trainable), !fusion.trainable);
      }
      held.register_module(fusion_layer_name(place.first, place.second), layer);
    }
    adapters_module.register_module(fusion_module_name(fusion.name()), held);
  }
  adapters_module.register_attribute("fusions", c10::ListType::ofStrings(), configs);
}

}  // namespace torchgraft
