#include "adapter_store.h"

#include <torchgraft/patch/life.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/registration/error_text.h>

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iostream>
#include <sstream>

namespace {

using torchgraft::AdapterPool;
using torchgraft::AdapterSpec;

constexpr size_t kLongestName = 128;

// Whether a directory of the folder may have this name. Without dots and slashes no name leads out of the folder.
bool is_name(const std::string& name) {
  return !name.empty() && name.size() <= kLongestName && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return c < 0x80 && (std::isalnum(c) || c == '_' || c == '-');
  });
}

bool is_adapter(const std::filesystem::path& directory) {
  std::error_code none;
  return std::filesystem::is_regular_file(directory / "adapter_config.json", none);
}

std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (is_name(name) && is_adapter(entry.path())) {
      names.push_back(name);
    }
  }
  return names;
}

std::string read_config(const std::filesystem::path& directory) {
  std::ifstream file(directory / "adapter_config.json", std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

bool is_grafted(const torch::jit::Module& module) { return module.find_method("adapter_names").has_value(); }

torchgraft::AdapterPoolOptions pool_options(const torch::jit::Module& module, const std::filesystem::path& folder,
                                            torchgraft::AdapterPoolOptions options) {
  if (is_grafted(module)) {
    options.graft = {};
  }
  options.room.clear();
  std::set<std::string> seen;
  for (const std::string& name : names_in(folder)) {
    try {
      const auto config = torchgraft::config_from_json(read_config(folder / name));
      torchgraft::check_supported(config);
      if (seen.insert(torchgraft::config_to_json(config)).second) {
        options.room.push_back(config);
      }
    } catch (const std::exception& error) {
      std::cerr << "adapter " << name << " cannot be served: " << torchgraft::one_line(error) << "\n";
    }
  }
  return options;
}

std::map<std::string, std::string> own_configs(const torch::jit::Module& module) {
  std::map<std::string, std::string> configs;
  if (is_grafted(module)) {
    for (const torchgraft::AdapterInfo& info : torchgraft::list_adapters(module)) {
      configs[info.name] = info.config;
    }
  }
  return configs;
}

// Runs `action`. An error of libtorch's becomes the answer 422.
template <typename Action>
auto answered(const std::string& name, Action action) {
  try {
    return action();
  } catch (const c10::Error& error) {
    throw RequestError(422, "adapter '" + name + "' cannot be loaded: " + torchgraft::one_line(error));
  }
}

}  // namespace

AdapterStore::AdapterStore(const torch::jit::Module& module, std::filesystem::path folder,
                           const torchgraft::AdapterPoolOptions& options)
    : folder_(std::move(folder)),
      own_(own_configs(module)),
      pool_(module, pool_options(module, folder_, options), [this](const std::string& name) { return read(name); }) {}

AdapterSpec AdapterStore::read(const std::string& name) const {
  return torchgraft::read_adapter_directory((folder_ / name).string(), name);
}

bool AdapterStore::is_served(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  return own_.count(name) || (is_name(name) && !removed_.count(name) && is_adapter(folder_ / name));
}

void AdapterStore::check_served(const std::string& name) const {
  if (!is_name(name)) {
    throw RequestError(404, "expected an adapter's name of letters, digits, '_' and '-', got '" + name + "'");
  }
  if (!is_served(name)) {
    throw RequestError(404, "no adapter is called '" + name + "'");
  }
}

std::optional<AdapterPool::Lease> AdapterStore::try_acquire(const std::string& name) {
  if (!name.empty()) {
    check_served(name);
  }
  return pool_.try_acquire({name});
}

AdapterPool::Lease AdapterStore::acquire(const std::string& name) {
  check_served(name);
  return answered(name, [&] { return pool_.acquire({name}); });
}

void AdapterStore::load(const std::string& name) {
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  if (!is_name(name) || !is_adapter(folder_ / name)) {
    throw RequestError(404, "no adapter of that name is in the folder");
  }
  answered(name, [&] { pool_.insert(read(name)); });
  const std::lock_guard lock(mutex_);
  removed_.erase(name);
}

void AdapterStore::remove(const std::string& name) {
  check_served(name);
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  {
    const std::lock_guard lock(mutex_);
    removed_.insert(name);
  }
  pool_.evict(name);
}

std::vector<AdapterStore::Info> AdapterStore::list() const {
  std::set<std::string> names;
  for (const auto& [name, config] : own_) {
    names.insert(name);
  }
  for (const std::string& name : names_in(folder_)) {
    if (is_served(name)) {
      names.insert(name);
    }
  }
  const std::vector<std::string> resident = pool_.resident();
  std::vector<Info> result;
  for (const std::string& name : names) {
    result.push_back({name, std::binary_search(resident.begin(), resident.end(), name)});
  }
  return result;
}

std::string AdapterStore::config(const std::string& name) const {
  check_served(name);
  const auto own = own_.find(name);
  return answered(name, [&] {
    return own != own_.end() ? own->second
                             : torchgraft::config_to_json(torchgraft::config_from_json(read_config(folder_ / name)));
  });
}
