#include <torchgraft/patch/module/quantized_maps.h>

#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/sites/base_weight.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

const std::vector<std::string>& role_names() {
  static const std::vector<std::string> names = {"query",  "key",      "value",   "output",
                                                 "ffn_in", "ffn_gate", "ffn_out", "other"};
  return names;
}

// The tensor that `weight` is: a parameter or a constant, perhaps with its two dimensions exchanged. Undefined when it
// is computed in another way.
at::Tensor matrix_of(const Value* weight, const Module& module) {
  if (const at::Tensor tensor = resolve_tensor(weight, module); tensor.defined()) {
    return tensor.detach();
  }
  const Node* node = weight->node();
  if (is_aten(node, {"detach", "alias", "contiguous", "clone"})) {
    return matrix_of(node->namedInput("self"), module);
  }
  const bool exchanges = is_aten(node, {"t", "numpy_T", "transpose"});
  const at::Tensor tensor = exchanges ? matrix_of(node->namedInput("self"), module) : at::Tensor();
  if (!tensor.defined() || tensor.dim() != 2) {
    return {};
  }
  if (!is_aten(node, {"transpose"})) {
    return tensor.t();
  }
  const auto first = constant_int(node->namedInput("dim0"));
  const auto second = constant_int(node->namedInput("dim1"));
  return first && second ? tensor.transpose(*first, *second) : at::Tensor();
}

// One scale for each row; torch.ao.quantization's PerChannelMinMaxObserver computes the same numbers.
at::Tensor quantized_rows(const at::Tensor& weight) {
  constexpr double kSteps = (127 - -128) / 2.0;
  const at::Tensor largest = weight.abs().amax({1});
  const at::Tensor scales = (largest / kSteps).clamp_min(std::numeric_limits<float>::epsilon());
  const at::Tensor zero_points = at::zeros({weight.size(0)}, at::kLong);
  return at::quantize_per_channel(weight, scales.to(at::kDouble), zero_points, /*axis=*/0, at::kQInt8);
}

c10::IValue packed(const at::Tensor& weight, const at::Tensor& bias) {
  torch::jit::Stack stack = {quantized_rows(weight), bias.defined() ? c10::IValue(bias.detach()) : c10::IValue()};
  c10::Dispatcher::singleton().findSchemaOrThrow("quantized::linear_prepack", "").callBoxed(stack);
  return stack.front();
}

// Why a weight or a bias cannot be packed; empty when it can.
std::string obstacle(const at::Tensor& tensor, const char* what, int64_t dimensions) {
  if (!tensor.defined()) {
    return std::string("its ") + what + " is computed, or some rows of a parameter";
  }
  if (tensor.scalar_type() != at::kFloat || !tensor.device().is_cpu() || tensor.layout() != at::kStrided) {
    return c10::str("its ", what, " is ", tensor.scalar_type(), " on ", tensor.device(), ", not float32 on the CPU");
  }
  if (tensor.dim() != dimensions || tensor.numel() == 0) {
    return c10::str("its ", what, " has the shape ", tensor.sizes());
  }
  return tensor.isfinite().all().item<bool>() ? "" : std::string("its ") + what + " has numbers that are not finite";
}

std::map<const Node*, std::set<std::string>> roles_of(const GraphSites& sites) {
  std::map<const Node*, std::set<std::string>> result;
  const auto add = [&](const LinearSite& site, const char* role) {
    result[site.node].insert(role);
    for (const Node* other : site.elsewhere) {
      result[other].insert(role);
    }
  };
  for (const LayerSites& layer : sites.layers) {
    add(layer.query, "query");
    add(layer.key, "key");
    add(layer.value, "value");
    const std::pair<const std::optional<LinearSite>*, const char*> others[] = {{&layer.output, "output"},
                                                                               {&layer.ffn_in, "ffn_in"},
                                                                               {&layer.ffn_gate, "ffn_gate"},
                                                                               {&layer.ffn_out, "ffn_out"}};
    for (const auto& [site, role] : others) {
      if (*site) {
        add(**site, role);
      }
    }
  }
  return result;
}

bool names(const std::string& entry, const QuantizedMap& map) {
  return map.roles.count(entry) > 0 || (!map.path.empty() && (map.path == entry || map.path.starts_with(entry + ".")));
}

void check_skip(const std::vector<std::string>& skip, const std::vector<QuantizedMap>& maps) {
  for (const std::string& entry : skip) {
    const bool is_role = std::find(role_names().begin(), role_names().end(), entry) != role_names().end();
    const bool is_used =
        std::any_of(maps.begin(), maps.end(), [&](const QuantizedMap& map) { return names(entry, map); });
    TORCH_CHECK(is_role || is_used, "quantize: skip names '", entry,
                "', which is no linear map's path, no module with linear maps, and no role (",
                c10::Join(", ", role_names()), ")");
  }
}

// "encoder.output.dense._packed_params" for the weight "encoder.output.dense.weight", "attn.in_proj_packed_params" for
// "attn.in_proj_weight".
std::string packed_name(const WeightSource& source) {
  const std::string path = module_path(source);
  if (path.empty()) {
    return "";
  }
  return path + (source.path == path + ".weight" ? "._packed_params" : "_packed_params");
}

}  // namespace

std::vector<QuantizedMap> quantize_maps(Graph& graph, const GraphSites& sites, const Module& module,
                                        const std::vector<std::string>& skip) {
  const at::NoGradGuard no_grad;
  const auto roles = roles_of(sites);
  std::vector<QuantizedMap> result;
  for_each_node(graph.block(), [&](Node* node) {
    if (is_linear(node)) {
      QuantizedMap map;
      map.node = node;
      map.path = module_path(weight_source(linear_weight(node), module));
      const auto found = roles.find(node);
      map.roles = found == roles.end() ? std::set<std::string>{"other"} : found->second;
      result.push_back(std::move(map));
    }
  });
  check_skip(skip, result);
  // By the data of weight and bias, and the order in which the weight is read.
  std::map<std::tuple<const void*, const void*, int64_t>, c10::IValue> known;
  std::set<std::string> taken;
  SymbolicShapes shapes(module);
  for (QuantizedMap& map : result) {
    const WeightSource source = weight_source(linear_weight(map.node), module);
    if (const auto shape = shapes.shape(linear_weight(map.node)); shape && shape->size() == 2) {
      map.out_features = shape->front().is_constant() ? shape->front().factor : 0;
      map.in_features = shape->back().is_constant() ? shape->back().factor : 0;
    }
    const auto is_named = [&](const std::string& entry) { return names(entry, map); };
    if (is_packed_linear(map.node)) {
      map.kept = "it is packed already";
    } else if (std::any_of(skip.begin(), skip.end(), is_named)) {
      map.kept = "skip names it";
    }
    if (!map.kept.empty()) {
      continue;
    }
    const at::Tensor weight = matrix_of(linear_weight(map.node), module);
    const Value* bias_value = map.node->namedInput("bias");
    const at::Tensor bias = is_none(bias_value) ? at::Tensor() : resolve_tensor(bias_value, module);
    map.kept = obstacle(weight, "weight", 2);
    if (map.kept.empty() && !is_none(bias_value)) {
      map.kept = obstacle(bias, "bias", 1);
    }
    if (!map.kept.empty()) {
      continue;
    }
    map.attribute = packed_name(source);
    c10::IValue& whole = known[{weight.data_ptr(), bias.defined() ? bias.data_ptr() : nullptr, weight.stride(0)}];
    if (whole.isNone() && !map.attribute.empty() && !taken.insert(map.attribute).second) {
      map.kept = "another map reads its weight with another bias";
      continue;
    }
    whole = whole.isNone() ? packed(weight, bias) : whole;
    map.packed = whole;
  }
  return result;
}

}  // namespace torchgraft
