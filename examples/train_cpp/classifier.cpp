#include "classifier.h"

#include <torchgraft/patch/head.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/load_module.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/train.h>

#include <ATen/ATen.h>

#include <algorithm>

namespace {

torch::jit::Module load(const std::string& path) {
  torch::jit::Module module = torchgraft::load_module(path);
  module.eval();
  return module;
}

bool has_adapter(const torch::jit::Module& module, const std::string& name) {
  const auto method = module.find_method("adapter_names");
  if (!method) {
    return false;
  }
  const c10::IValue names = (*method)({});
  const auto list = names.toListRef();
  return std::any_of(list.begin(), list.end(), [&](const c10::IValue& each) { return each.toStringRef() == name; });
}

// An adapter of the model's file goes on with the gates that it has.
void check_gate_pooling(const torch::jit::Module& module, const AdapterOptions& options) {
  for (const torchgraft::AdapterInfo& info : torchgraft::list_adapters(module)) {
    const bool other = info.name == options.name && !info.gate_pooling.empty() && !options.gate_pooling.empty() &&
                       info.gate_pooling != options.gate_pooling;
    TORCH_CHECK(!other, "the gates of '", info.name, "' are means over ", info.gate_pooling,
                " tokens; leave --gate-pooling out to train it further");
  }
}

torch::jit::Module with_adapter(const torch::jit::Module& base, const AdapterOptions& options) {
  if (has_adapter(base, options.name)) {
    check_gate_pooling(base, options);
    torch::jit::Module module = torchgraft::unfreeze_adapter(base, options.name);
    module.get_method("activate")({options.name});
    return module;
  }
  torchgraft::AdapterSpec spec{options.name, torchgraft::config_from_string(options.config), std::nullopt, ""};
  spec.trainable = true;
  torchgraft::GraftOptions graft;
  graft.gate_pooling = options.gate_pooling;
  return torchgraft::graft(base, {spec}, graft);
}

void check_labels(const torchgraft::HeadConfig& head, const std::string& adapter,
                  const std::vector<std::string>& labels) {
  TORCH_CHECK(head.num_labels == static_cast<int64_t>(labels.size()), "the head of '", adapter, "' has ",
              head.num_labels, " labels, --labels names ", labels.size());
  for (const auto& [label, index] : head.label2id.value_or(std::map<std::string, int64_t>{})) {
    TORCH_CHECK(labels.at(static_cast<size_t>(index)) == label, "the head of '", adapter, "' has the label ", label,
                " where --labels has ", labels.at(static_cast<size_t>(index)));
  }
}

torch::jit::Module with_head(const torch::jit::Module& module, const AdapterOptions& options,
                             const std::vector<std::string>& labels) {
  const std::string own = torchgraft::head_config(module, options.name);
  if (!own.empty()) {
    check_labels(torchgraft::head_config_from_json(own), options.name, labels);
    return module;
  }
  torchgraft::HeadConfig head;
  head.num_labels = static_cast<int64_t>(labels.size());
  head.layers = options.head_layers;
  head.dropout_prob = options.head_dropout;
  head.pooling = options.pooling;
  head.label2id.emplace();
  for (size_t i = 0; i < labels.size(); ++i) {
    head.label2id->emplace(labels[i], static_cast<int64_t>(i));
  }
  return torchgraft::add_head(module, options.name, head);
}

}  // namespace

Classifier::Classifier(const AdapterOptions& options, const std::vector<std::string>& labels)
    : module_(with_head(with_adapter(load(options.base), options), options, labels)),
      adapter_(options.name),
      inputs_(module_, "forward_with_head"),
      parameters_(torchgraft::trainable_parameters(module_, adapter_)) {}

at::Tensor Classifier::logits(const Examples& rows) const {
  return module_.get_method("forward_with_head")(inputs_.arguments({rows.input_ids, rows.attention_mask})).toTensor();
}

void Classifier::save(const std::string& directory, const std::string& model_class) const {
  torchgraft::save_adapter(module_, adapter_, directory, model_class);
}
