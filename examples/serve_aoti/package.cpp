#include "package.h"

#include <torchgraft/registration/parse_json.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/serialization/import.h>

#include <sstream>
#include <stdexcept>

namespace {

constexpr const char* kBanks = "adapters.";

std::string size_text(const Banks& banks, const std::string& name) {
  const auto found = banks.find(name);
  if (found == banks.end()) {
    return "none";
  }
  std::ostringstream text;
  text << found->second.scalar_type() << " " << found->second.sizes();
  return text.str();
}

}  // namespace

Package::Package(const std::string& path) : loader_(path) {
  const auto metadata = loader_.get_metadata();
  const auto found = metadata.find("torchgraft");
  if (found == metadata.end()) {
    throw std::runtime_error(path + ": has no adapters; expected a package of torchgraft export --aoti");
  }
  description_ = torchgraft::parse_json(found->second, path);
}

std::vector<std::string> Package::adapter_names() const {
  std::vector<std::string> names;
  for (const auto& adapter : description_.at("adapters")) {
    names.push_back(adapter.at("name"));
  }
  return names;
}

Response Package::run(std::vector<at::Tensor> inputs, const std::vector<int64_t>& ids) {
  const bool takes_ids = description_.at("adapter_ids");
  if (takes_ids == ids.empty()) {
    throw std::runtime_error(takes_ids ? "the package takes adapter_ids: give one for each row"
                                       : "the package takes no adapter_ids: all rows use one adapter");
  }
  if (takes_ids) {
    inputs.push_back(at::tensor(ids, at::kLong));
  }
  const std::vector<at::Tensor> outputs = loader_.run(inputs);
  return {outputs.at(0), gates_of(outputs, ids)};
}

// The last outputs are the gates of all rows; an adapter has some of their columns.
std::vector<AdapterGates> Package::gates_of(const std::vector<at::Tensor>& outputs,
                                            const std::vector<int64_t>& ids) const {
  const std::vector<std::string> names = description_.at("gate_outputs");
  std::vector<AdapterGates> result;
  int64_t number = -1;
  for (const std::string& adapter : adapter_names()) {
    ++number;
    AdapterGates gates{adapter, {}, {}};
    for (size_t row = 0; row < ids.size(); ++row) {
      if (ids[row] == number) {
        gates.rows.push_back(static_cast<int64_t>(row));
      }
    }
    if (gates.rows.empty() || names.empty()) {
      continue;
    }
    const auto& columns = description_.at("gates").at(adapter);
    for (size_t index = 0; index < names.size(); ++index) {
      if (!columns.contains(names[index])) {
        continue;
      }
      // "layer_0.selfattn_lora"
      const size_t dot = names[index].find('.');
      const int64_t layer = std::stoll(names[index].substr(std::string("layer_").size()));
      const at::Tensor& output = outputs.at(outputs.size() - names.size() + index);
      const std::vector<int64_t> used = columns.at(names[index]);
      gates.layers[layer][names[index].substr(dot + 1)] =
          output.index_select(0, at::tensor(gates.rows)).index_select(1, at::tensor(used));
    }
    result.push_back(std::move(gates));
  }
  return result;
}

void Package::swap_banks(const Banks& banks, const Banks& like) {
  Banks used;
  for (const std::string& name : loader_.get_constant_fqns()) {
    if (!name.starts_with(kBanks)) {
      continue;
    }
    // load_constants checks no sizes.
    const std::string expected = size_text(like, name), found = size_text(banks, name);
    if (!banks.contains(name) || expected != found) {
      throw std::runtime_error("the bank " + name + " is " + expected + " in the package, and " + found +
                               " in the new file: export that file");
    }
    used[name] = banks.at(name).contiguous();
  }
  // In place. Not update_constant_buffer: it knows other names, and ignores these without an error. Not the inactive
  // buffer: what it is not given, it does not have.
  loader_.load_constants(used, /*use_inactive=*/false, /*check_full_update=*/false);
}

Banks read_banks(const std::string& path) {
  const torch::jit::Module module = torch::jit::load(path, at::kCPU);
  Banks banks;
  for (const auto& tensor : module.named_parameters()) {
    banks[tensor.name] = tensor.value.detach();
  }
  for (const auto& tensor : module.named_buffers()) {
    banks[tensor.name] = tensor.value;
  }
  std::erase_if(banks, [](const auto& bank) { return !bank.first.starts_with(kBanks); });
  return banks;
}
