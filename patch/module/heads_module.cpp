#include <torchgraft/patch/module/heads_module.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/module/head_logits.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>
#include <utility>

namespace torchgraft {
namespace {

using torch::jit::Module;

const std::vector<std::string> kWeights = {"dense_weight", "dense_bias", "out_weight", "out_bias"};

constexpr const char* kHeadsMethods = R"python(
def logits_of(self, hidden: Tensor, token_mask: Optional[Tensor], adapter: int) -> Tensor:
    labels = self.labels[adapter]
    assert labels > 0, "forward_with_head: the adapter '" + self.names[adapter] + "' has no head"
    return self.head_logits(
        hidden, token_mask, self.pooling[adapter], self.layers[adapter], self.activations[adapter],
        self.dropout[adapter], self.dense_weight_of(adapter), self.dense_bias_of(adapter),
        self.out_weight_of(adapter).narrow(0, 0, labels), self.out_bias_of(adapter).narrow(0, 0, labels))

def logits(self, hidden: Tensor, token_mask: Optional[Tensor], adapter_ids: Optional[Tensor], active: int) -> Tensor:
    assert hidden.dim() == 3, "forward_with_head: expected the module's result to be hidden states [B, S, H], got " + \
        str(hidden.dim()) + " dimensions"
    if token_mask is not None:
        assert token_mask.dim() == 2 and token_mask.size(1) == hidden.size(1), \
            "forward_with_head: expected the heads' token mask (add_head's token_mask) to be [B, S] for hidden " \
            "states " + str(hidden.size()) + ", got " + str(token_mask.size()) + "; name another argument"
    if adapter_ids is None:
        assert active >= 0, "forward_with_head: no adapter is active; activate one, or pass adapter_ids"
        return self.logits_of(hidden, token_mask, active)
    assert bool(adapter_ids.ge(0).all()), "forward_with_head: a row of the base model (adapter_ids -1) has no head"
    most = max(self.labels)
    result: Optional[Tensor] = None
    for adapter in range(len(self.names)):
        rows = torch.nonzero(torch.eq(adapter_ids, adapter)).view(-1)
        if rows.numel() > 0:
            mask: Optional[Tensor] = None
            if token_mask is not None:
                mask = token_mask.index_select(0, rows)
            own = self.logits_of(hidden.index_select(0, rows), mask, adapter)
            own = torch.constant_pad_nd(own, [0, most - own.size(-1)], float("-inf"))
            if result is None:
                result = torch.zeros([hidden.size(0)] + list(own.size())[1:], dtype=own.dtype, device=own.device)
            assert result.dim() == own.dim(), \
                "forward_with_head: heads with a result per row and heads with one per token cannot share a batch"
            result = result.index_copy(0, rows, own)
    if result is None:
        return torch.zeros([0, most], dtype=hidden.dtype, device=hidden.device)
    return result
)python";

bool has_head(const Adapter& adapter) { return adapter.head.has_value(); }

// [N, ...]. The rows of trainable heads count for the sizes and are zero: nobody reads them.
at::Tensor stack(const std::vector<Adapter>& adapters, const std::string& name) {
  std::vector<std::pair<size_t, at::Tensor>> rows;
  for (size_t a = 0; a < adapters.size(); ++a) {
    if (has_head(adapters[a])) {
      rows.emplace_back(a, adapters[a].head->weights.at(name));
    }
  }
  at::Tensor bank = stack_rows(name, rows, adapters.size());
  for (const auto& [a, weight] : rows) {
    if (adapters[a].trainable) {
      bank[static_cast<int64_t>(a)].zero_();
    }
  }
  return bank;
}

void register_own(Module& heads, const Adapter& adapter, const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
  Module own(c10::QualifiedName("__torch__.torchgraft.TrainableHead"), unit, /*shouldMangle=*/true);
  own.register_attribute("training", c10::BoolType::get(), false);
  for (const std::string& name : kWeights) {
    const at::Tensor weight = adapter.head->weights.at(name).detach().clone();
    const bool learned = is_learned(adapter.head->config, name) && weight.numel() > 0;
    own.register_parameter(name, weight.set_requires_grad(learned), /*is_buffer=*/!learned);
  }
  heads.register_module(own_module_name(adapter.name), own);
}

void register_fields(Module& heads, const std::vector<Adapter>& adapters) {
  c10::List<std::string> names, configs, activations, pooling;
  c10::List<int64_t> labels, layers;
  c10::List<double> dropout;
  for (const Adapter& adapter : adapters) {
    const HeadConfig config = adapter.head ? adapter.head->config : HeadConfig{};
    names.push_back(adapter.name);
    configs.push_back(adapter.head ? head_config_to_json(config) : "");
    activations.push_back(head_activation(config));
    pooling.push_back(head_pooling(config));
    labels.push_back(adapter.head ? config.num_labels : 0);
    layers.push_back(config.layers);
    dropout.push_back(adapter.trainable ? config.dropout_prob.value_or(0.0) : 0.0);
  }
  heads.register_attribute("names", c10::ListType::ofStrings(), names);
  heads.register_attribute("configs", c10::ListType::ofStrings(), configs);
  heads.register_attribute("activations", c10::ListType::ofStrings(), activations);
  heads.register_attribute("pooling", c10::ListType::ofStrings(), pooling);
  heads.register_attribute("labels", c10::ListType::ofInts(), labels);
  heads.register_attribute("layers", c10::ListType::ofInts(), layers);
  heads.register_attribute("dropout", c10::ListType::ofFloats(), dropout);
}

// Methods whose text depends on the adapters: a weight of one of them.
std::string accessors(const std::vector<Adapter>& adapters) {
  std::string source;
  for (const std::string& name : kWeights) {
    source += "\ndef " + name + "_of(self, adapter: int) -> Tensor:\n";
    for (size_t a = 0; a < adapters.size(); ++a) {
      if (has_head(adapters[a]) && adapters[a].trainable) {
        source += "    if adapter == " + std::to_string(a) + ":\n        return self." +
                  own_module_name(adapters[a].name) + "." + name + "\n";
      }
    }
    source += "    return self." + name + ".select(0, adapter)\n";
  }
  return source;
}

std::set<std::string> activations_of(const std::vector<Adapter>& adapters) {
  std::set<std::string> names;
  for (const Adapter& adapter : adapters) {
    if (has_head(adapter) && adapter.head->config.activation_function) {
      names.insert(*adapter.head->config.activation_function);
    }
  }
  return names;
}

// The head in a row of the banks; `owner` may have it for itself.
std::optional<Head> head_in_row(const Module& heads, size_t row, const std::string& owner) {
  const auto configs = heads.attr("configs").toListRef();
  if (row >= configs.size() || configs[row].toStringRef().empty()) {
    return std::nullopt;
  }
  Head head{head_config_from_json(configs[row].toStringRef()), {}};
  const std::string own = own_module_name(owner);
  for (const std::string& name : kWeights) {
    if (heads.hasattr(own)) {
      head.weights[name] = heads.attr(own).toModule().attr(name).toTensor().detach().clone();
      continue;
    }
    const at::Tensor weight = heads.attr(name).toTensor().detach()[static_cast<int64_t>(row)];
    const int64_t first = name.starts_with("dense_") ? head.config.layers - 1 : head.config.num_labels;
    head.weights[name] = weight.narrow(0, 0, first).clone();
  }
  return head;
}

}  // namespace

bool is_learned(const HeadConfig& config, const std::string& name) { return config.bias || name != "out_bias"; }

void add_heads(Module& adapters_module, const std::vector<Adapter>& adapters,
               const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
  if (std::none_of(adapters.begin(), adapters.end(), has_head)) {
    return;
  }
  at::NoGradGuard no_grad;
  Module heads(c10::QualifiedName("__torch__.torchgraft.Heads"), unit, /*shouldMangle=*/true);
  heads.register_attribute("training", c10::BoolType::get(), false);
  register_fields(heads, adapters);
  for (const std::string& name : kWeights) {
    heads.register_parameter(name, stack(adapters, name), /*is_buffer=*/false);
  }
  for (const Adapter& adapter : adapters) {
    if (has_head(adapter) && adapter.trainable) {
      register_own(heads, adapter, unit);
    }
  }
  heads.define(head_methods(activations_of(adapters)) + accessors(adapters) + kHeadsMethods);
  adapters_module.register_module("heads", heads);
}

std::vector<Adapter> head_owners(const std::vector<Adapter>& adapters,
                                 const std::vector<NamedComposition>& compositions,
                                 const std::function<bool(const std::string& fusion)>& trains) {
  std::vector<Adapter> result = adapters;
  if (std::none_of(compositions.begin(), compositions.end(), [](const auto& held) { return held.head.has_value(); })) {
    return result;
  }
  for (const NamedComposition& composition : compositions) {
    const std::vector<std::string> fusions = fusion_names(composition.tree);
    Adapter owner{composition.name, {}};
    owner.head = composition.head;
    owner.trainable = std::any_of(fusions.begin(), fusions.end(), trains);
    result.push_back(std::move(owner));
  }
  return result;
}

void read_heads(const Module& adapters_module, std::vector<Adapter>& adapters) {
  if (!adapters_module.hasattr("heads")) {
    return;
  }
  const Module heads = adapters_module.attr("heads").toModule();
  for (size_t a = 0; a < adapters.size(); ++a) {
    adapters[a].head = head_in_row(heads, a, adapters[a].name);
  }
}

void read_heads(const Module& adapters_module, size_t adapters, std::vector<NamedComposition>& compositions) {
  if (!adapters_module.hasattr("heads")) {
    return;
  }
  const Module heads = adapters_module.attr("heads").toModule();
  for (size_t i = 0; i < compositions.size(); ++i) {
    compositions[i].head = head_in_row(heads, adapters + i, compositions[i].name);
  }
}

}  // namespace torchgraft
