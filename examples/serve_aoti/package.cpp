#include "package.h"

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/parse_json.h>
#include <torchgraft/registration/tensor_records.h>

#include <ATen/ATen.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

namespace {

constexpr const char* kPoolsAll = "adapters.pools_all";  // one flag for each adapter, where they differ in it

std::string size_of(const Banks& banks, const std::string& name) {
  const auto found = banks.find(name);
  return found == banks.end() ? "none" : size_text(found->second);
}

std::string joined(const std::vector<std::string>& texts) {
  std::string result;
  for (const std::string& text : texts) {
    result += (result.empty() ? "" : ", ") + text;
  }
  return result;
}

// "task (gates over all tokens)", for each adapter.
std::vector<std::string> adapter_texts(const torch::jit::Module& module, const std::string& path) {
  std::vector<std::string> result;
  const c10::IValue names = module.get_method("adapter_names")({});
  for (const c10::IValue& held : names.toListRef()) {
    const std::string& name = held.toStringRef();
    const auto config = torchgraft::parse_json(module.get_method("adapter_config")({name}).toStringRef(), path);
    result.push_back(name + " (gates over " + config.value("gate_pooling", "all") + " tokens)");
  }
  return result;
}

torch::jit::Module load_module(const std::string& path) {
  try {
    torchgraft::check_tensor_records(path);
    return torch::jit::load(path, at::kCPU);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not a TorchScript file that can be loaded: " + torchgraft::one_line(error));
  }
}

nlohmann::json description_in(const std::string& path) {
  nlohmann::json description = package_description(path, "expected one of torchgraft export MODEL.pt --aoti");
  if (description.contains("pool")) {
    throw std::runtime_error(path +
                             ": a package of a pool, whose banks are empty until a pool writes adapters into them; "
                             "serve it with examples/server --package, or export MODEL.pt without --pool");
  }
  return description;
}

}  // namespace

Package::Package(const std::string& path) : description_(description_in(path)), loader_(path) {}

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
    throw std::runtime_error(takes_ids
                                 ? "the package takes adapter_ids: give one for each row"
                                 : "the package takes no adapter_ids, all rows use one adapter: leave --adapter-ids "
                                   "out, or export without --no-ids");
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

void Package::swap_banks(const BankFile& file, const BankFile& like) {
  const std::vector<std::string> names = loader_.get_constant_fqns();
  // A new file with that flag mixes what the package does not.
  const bool mixes = std::find(names.begin(), names.end(), kPoolsAll) != names.end();
  if (!mixes && (file.adapters != like.adapters || file.banks.contains(kPoolsAll) != like.banks.contains(kPoolsAll))) {
    throw std::runtime_error("the package has the adapters " + joined(like.adapters) + ", and the new file has " +
                             joined(file.adapters) + ": export that file");
  }
  if (const std::string other = other_sharing(like.banks, file.banks); !other.empty()) {
    throw std::runtime_error(other + ": export the new file");
  }
  // The code may have the numbers of what the package does not hold as a tensor.
  const std::set<const void*> held = memory_of(names, like.banks);
  for (const auto& [name, bank] : like.banks) {
    const bool is_equal =
        size_of(like.banks, name) == size_of(file.banks, name) && at::equal(bank, file.banks.at(name));
    if (!held.contains(bank.data_ptr()) && !is_equal) {
      throw std::runtime_error("the bank " + name +
                               " has changed, and the package does not have it as a tensor: export the new file");
    }
  }
  Banks used;
  for (const std::string& name : names) {
    if (!name.starts_with(kBanks)) {
      continue;
    }
    // load_constants checks no sizes.
    const std::string expected = size_of(like.banks, name), found = size_of(file.banks, name);
    if (!file.banks.contains(name) || expected != found) {
      throw std::runtime_error("the bank " + name + " is " + expected + " in the package, and " + found +
                               " in the new file: export that file");
    }
    used[name] = file.banks.at(name).contiguous();
  }
  // In place. Not update_constant_buffer: it knows other names, and ignores these without an error. Not the inactive
  // buffer: what it is not given, it does not have.
  loader_.load_constants(used, /*use_inactive=*/false, /*check_full_update=*/false);
}

BankFile read_banks(const std::string& path) {
  const torch::jit::Module module = load_module(path);
  Banks banks;
  for (const auto& tensor : module.named_parameters()) {
    banks[tensor.name] = tensor.value.detach();
  }
  for (const auto& tensor : module.named_buffers()) {
    banks[tensor.name] = tensor.value;
  }
  std::erase_if(banks, [](const auto& bank) { return !bank.first.starts_with(kBanks); });
  return {std::move(banks), adapter_texts(module, path)};
}
