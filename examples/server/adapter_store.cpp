#include "adapter_store.h"

#include "log.h"

#include <torchgraft/config/composition_string.h>
#include <torchgraft/patch/check_room.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/registration/error_text.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>

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

constexpr const char* kNoComposition =
    "it is a composition, and the server serves single adapters; ask for one of its adapters, or run the composition "
    "in a program of your own, as examples/serve does";

// One look: between two, another process may begin to save.
bool has_adapter(const std::filesystem::path& folder, const std::string& name) {
  return !folder.empty() && torchgraft::is_adapter_directory((folder / name).string());
}

std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  if (folder.empty()) {
    return names;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (is_name(name) && has_adapter(folder, name)) {
      names.push_back(name);
    }
  }
  return names;
}

void report(const std::string& name, const std::string& why) {
  log_line("adapter " + name + " cannot be served: " + torchgraft::one_line(why));
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

// Names the directories of adapters whose names no request can give.
void report_bad_names(const std::filesystem::path& folder) {
  if (folder.empty()) {
    return;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!is_name(name) && has_adapter(folder, name)) {
      report(torchgraft::one_line("'" + name + "'"),
             "requests name letters, digits, '_' and '-' only; give the directory such a name");
    }
  }
}

// Names the directories of compositions, which are no adapters.
void report_setups(const std::filesystem::path& folder) {
  if (folder.empty()) {
    return;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!has_adapter(folder, name) && torchgraft::is_setup_directory(entry.path().string())) {
      report(torchgraft::one_line(name), kNoComposition);
    }
  }
}

// What libtorchgraft warns of at the start it says again when the adapter is loaded.
class NoWarnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& /*warning*/) override {}
};

// The configurations in the folder, each once, with the names of their adapters. `own`: those in the model's file. Of
// weights it reads the headers alone: all files of a thousand adapters would keep the start waiting.
std::map<std::string, std::vector<std::string>> read_configs(const std::filesystem::path& folder,
                                                             const std::map<std::string, std::string>& own,
                                                             uint64_t file_bytes) {
  std::map<std::string, std::vector<std::string>> configs;
  NoWarnings none;
  const c10::WarningUtils::WarningHandlerGuard guard(&none);
  report_bad_names(folder);
  report_setups(folder);
  for (const std::string& name : names_in(folder)) {
    if (own.count(name)) {
      log_line("adapter " + name + " of the model's file is served; that of the folder is not: rename one of the two");
      continue;
    }
    try {
      const auto config = torchgraft::check_adapter_directory((folder / name).string(), file_bytes);
      torchgraft::check_supported(config);
      configs[torchgraft::config_to_json(config)].push_back(name);
    } catch (const std::exception& error) {
      report(name, error.what());
    }
  }
  return configs;
}

torchgraft::AdapterPoolOptions pool_options(const torch::jit::Module& module, const std::filesystem::path& folder,
                                            torchgraft::AdapterPoolOptions options, uint64_t file_bytes) {
  const auto configs = read_configs(folder, own_configs(module), file_bytes);
  options.room.clear();
  for (const auto& [json, names] : configs) {
    options.room.push_back(torchgraft::config_from_json(json));
  }
  const std::vector<std::string> faults = torchgraft::check_room(module, options);
  std::vector<torchgraft::AdapterConfig> room;
  size_t index = 0;
  for (const auto& [json, names] : configs) {
    if (faults[index].empty()) {
      room.push_back(options.room[index]);
    } else {
      std::for_each(names.begin(), names.end(), [&](const std::string& name) { report(name, faults[index]); });
    }
    ++index;
  }
  options.room = std::move(room);
  return options;
}

// What libtorchgraft warns of while this thread reads an adapter, as lines of the log.
class WarningLog : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { log_line("warning: " + torchgraft::one_line(warning.msg())); }
};

// Runs `action`. An error of libtorch's becomes the answer 422.
template <typename Action>
auto answered(const std::string& name, Action action) {
  WarningLog log;
  const c10::WarningUtils::WarningHandlerGuard guard(&log);
  try {
    return action();
  } catch (const c10::Error& error) {
    throw RequestError(422, "adapter '" + name + "' cannot be loaded: " + torchgraft::one_line(error));
  }
}

// Whether it is text such as "Stack(en, ner)".
bool is_composition(const std::string& name) {
  if (name.size() > kLongestName || name.find('(') == std::string::npos) {
    return false;
  }
  try {
    torchgraft::composition_from_string(name);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

void check_no_setup(const std::filesystem::path& folder, const std::string& name) {
  if (!folder.empty() && torchgraft::is_setup_directory((folder / name).string())) {
    throw RequestError(422, "'" + name + "': " + kNoComposition);
  }
}

}  // namespace

bool is_grafted(const torch::jit::Module& module) { return module.find_method("adapter_names").has_value(); }

AdapterStore::AdapterStore(const torch::jit::Module& module, std::filesystem::path folder,
                           const torchgraft::AdapterPoolOptions& options, uint64_t file_bytes)
    : folder_(std::move(folder)),
      file_bytes_(file_bytes),
      own_(own_configs(module)),
      pool_(module, pool_options(module, folder_, options, file_bytes),
            [this](const std::string& name) { return read(name); }) {}

AdapterSpec AdapterStore::read(const std::string& name) const {
  return torchgraft::read_adapter_directory((folder_ / name).string(), name, file_bytes_);
}

bool AdapterStore::is_removed(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  return removed_.count(name) > 0;
}

// Without a look into the folder.
void AdapterStore::check_name(const std::string& name) const {
  if (own_.count(name)) {
    return;
  }
  if (is_composition(name)) {
    throw RequestError(422, "'" + name + "': " + kNoComposition);
  }
  if (!is_name(name)) {
    throw RequestError(404, "expected an adapter's name of letters, digits, '_' and '-', got '" + name + "'");
  }
  if (is_removed(name)) {
    throw RequestError(404, "no adapter is called '" + name + "'");
  }
}

void AdapterStore::check_in_folder(const std::string& name) const {
  if (!own_.count(name) && !has_adapter(folder_, name)) {
    check_no_setup(folder_, name);
    throw RequestError(404, "no adapter is called '" + name + "'");
  }
}

std::optional<AdapterPool::Lease> AdapterStore::try_acquire(const std::string& name) {
  if (!name.empty()) {
    check_name(name);
  }
  return pool_.try_acquire({name});
}

AdapterPool::Lease AdapterStore::acquire(const std::string& name) {
  if (auto lease = try_acquire(name)) {
    return std::move(*lease);
  }
  check_in_folder(name);
  return answered(name, [&] { return pool_.acquire({name}); });
}

void AdapterStore::load(const std::string& name) {
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  if (folder_.empty()) {
    throw RequestError(404, "the server has no folder of adapters; start it with --adapters FOLDER");
  }
  if (!is_name(name) || !has_adapter(folder_, name)) {
    if (is_name(name)) {
      check_no_setup(folder_, name);
    }
    throw RequestError(404, "no adapter of that name is in the folder");
  }
  answered(name, [&] { pool_.insert(read(name)); });
  const std::lock_guard lock(mutex_);
  removed_.erase(name);
}

void AdapterStore::remove(const std::string& name) {
  check_name(name);
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  if (!pool_.try_acquire({name})) {
    check_in_folder(name);
  }
  {
    const std::lock_guard lock(mutex_);
    removed_.insert(name);
  }
  pool_.evict(name);
}

std::vector<AdapterStore::Info> AdapterStore::list() const {
  const std::vector<std::string> resident = pool_.resident();
  std::set<std::string> names(resident.begin(), resident.end());
  for (const auto& [name, config] : own_) {
    names.insert(name);
  }
  for (const std::string& name : names_in(folder_)) {
    names.insert(name);
  }
  std::vector<Info> result;
  for (const std::string& name : names) {
    if (own_.count(name) || !is_removed(name)) {
      result.push_back({name, std::binary_search(resident.begin(), resident.end(), name)});
    }
  }
  return result;
}

std::string AdapterStore::config(const std::string& name) const {
  check_name(name);
  if (const auto own = own_.find(name); own != own_.end()) {
    return own->second;
  }
  check_in_folder(name);
  return answered(
      name, [&] { return torchgraft::config_to_json(torchgraft::read_adapter_config((folder_ / name).string())); });
}
