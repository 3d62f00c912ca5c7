#include <torchgraft/plan/prefix_mlp.h>

#include <torchgraft/activations/activation.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <map>
#include <variant>
#include <vector>

namespace torchgraft {

at::Tensor eject(const ModuleWeights& mlp, const std::string& non_linearity) {
  at::NoGradGuard no_grad;
  const at::Tensor hidden = at::linear(mlp.at("embeddings"), mlp.at("down_weight"), mlp.at("down_bias"));
  return at::linear(find_activation(non_linearity).forward(hidden), mlp.at("up_weight"), mlp.at("up_bias"));
}

std::pair<at::Tensor, at::Tensor> prefix_of_layer(const at::Tensor& ejected, const PlannedPrefix& prefix) {
  // [P, L * 2, h, d]: keys of layer i at 2 i, values at 2 i + 1
  const at::Tensor all =
      ejected.view({prefix.config.prefix_length, prefix.group_size * 2, prefix.num_kv_heads, prefix.head_dim});
  const auto part = [&](int64_t index) { return all.select(1, index).transpose(0, 1).contiguous(); };
  return {part(2 * prefix.group_index), part(2 * prefix.group_index + 1)};
}

void check_prefix_groups(const Plan& plan) {
  std::map<std::string, const PlannedModule*> first;  // by pool
  for (const PlannedModule& module : plan) {
    const auto* prefix = std::get_if<PlannedPrefix>(&module.method);
    if (!prefix) {
      continue;
    }
    const PlannedModule& other = *first.emplace(prefix->pool, &module).first->second;
    const auto& expected = std::get<PlannedPrefix>(other.method);
    TORCH_CHECK(prefix->num_kv_heads == expected.num_kv_heads && prefix->head_dim == expected.head_dim,
                "plan: one MLP makes the prefixes of all layers (", module.location,
                "), and they have different sizes: ", expected.num_kv_heads, " heads of ", expected.head_dim,
                " in layer ", other.number, ", ", prefix->num_kv_heads, " heads of ", prefix->head_dim, " in layer ",
                module.number, "; leave the layers of one size out (leave_out)");
  }
}

void split_by_tower(const Plan& plan, const Structure& structure, Reparametrisation& sources) {
  std::vector<const PlannedModule*> layers;  // with prefixes of towers, in the order of the old MLP's outputs
  for (const Layer& layer : structure.layers) {
    for (const PlannedModule& module : plan) {
      const auto* prefix = std::get_if<PlannedPrefix>(&module.method);
      if (module.layer == layer.index && prefix && prefix->pool != module.location) {
        layers.push_back(&module);
      }
    }
  }
  const auto whole = layers.empty() ? sources.end() : sources.find(layers.front()->location);
  if (whole == sources.end()) {
    return;
  }
  const ModuleWeights mlp = whole->second;
  sources.erase(whole);
  const auto count = static_cast<int64_t>(layers.size());
  std::map<std::string, std::vector<int64_t>> parts;  // positions among the old MLP's layers, by pool
  for (int64_t i = 0; i < count; ++i) {
    parts[std::get<PlannedPrefix>(layers[i]->method).pool].push_back(i);
  }
  for (const auto& [pool, positions] : parts) {
    ModuleWeights& own = sources[pool] = mlp;
    for (const char* name : {"up_weight", "up_bias"}) {
      const at::Tensor by_layer = mlp.at(name).unflatten(0, {count, -1});
      own[name] = by_layer.index_select(0, at::tensor(positions, by_layer.options().dtype(at::kLong)))
                      .flatten(0, 1)
                      .contiguous();
    }
    own["embeddings"] = mlp.at("embeddings").clone();
    for (const char* name : {"down_weight", "down_bias"}) {
      own[name] = mlp.at(name).clone();
    }
  }
}

}  // namespace torchgraft
