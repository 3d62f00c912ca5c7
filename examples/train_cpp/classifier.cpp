#include "classifier.h"

#include <torchgraft/patch/head.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/train.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <filesystem>

namespace {

torch::jit::Module load(const std::string& path) {
  TORCH_CHECK(std::filesystem::exists(path), path, ": no such file");
  torch::jit::Module module;
  try {
    module = torch::jit::load(path, at::kCPU);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, path, ": not a TorchScript file that this libtorch can read");
  }
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

torch::jit::Module with_adapter(const torch::jit::Module& base, const AdapterOptions& options) {
  if (has_adapter(base, options.name)) {
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
    : module_(with_head(with_adapter(load(options.base), options), options, labels)), adapter_(options.name) {
  find_inputs();
  parameters_ = torchgraft::trainable_parameters(module_, adapter_);
}

void Classifier::find_inputs() {
  const auto& arguments = module_.get_method("forward_with_head").function().getSchema().arguments();
  bool has_ids = false;
  for (size_t i = 1; i < arguments.size(); ++i) {
    const std::string& name = arguments[i].name();
    const bool is_tensor = arguments[i].type()->isSubtypeOf(*c10::OptionalType::ofTensor());
    if (name == "adapter_ids") {
      continue;
    }
    Input input = Input::kNone;
    if (is_tensor && name.find("mask") != std::string::npos) {
      input = Input::kMask;
    } else if (is_tensor && name.find("type") != std::string::npos) {
      input = Input::kTypes;
    } else if (is_tensor && !has_ids) {
      input = Input::kIds;
      has_ids = true;
    } else {
      TORCH_CHECK(arguments[i].default_value(), "the model's forward has an argument '", name,
                  "' that there is nothing for; expected forward(input_ids, attention_mask)");
    }
    inputs_.push_back(input);
  }
  while (!inputs_.empty() && inputs_.back() == Input::kNone) {
    inputs_.pop_back();
  }
  TORCH_CHECK(has_ids, "the model's forward takes no token ids");
}

at::Tensor Classifier::logits(const Examples& rows) const {
  std::vector<c10::IValue> inputs;
  for (const Input input : inputs_) {
    switch (input) {
      case Input::kIds:
        inputs.emplace_back(rows.input_ids);
        break;
      case Input::kMask:
        inputs.emplace_back(rows.attention_mask);
        break;
      case Input::kTypes:
        inputs.emplace_back(at::zeros_like(rows.input_ids));
        break;
      case Input::kNone:
        inputs.emplace_back();
        break;
    }
  }
  return module_.get_method("forward_with_head")(std::move(inputs)).toTensor();
}

void Classifier::save(const std::string& directory, const std::string& model_class) const {
  torchgraft::save_adapter(module_, adapter_, directory, model_class);
}
