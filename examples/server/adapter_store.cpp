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
constexpr size_t kLongestText = 1024;  // of a composition

// Whether a directory of the folder may have this name. Without dots and slashes no name leads out of the folder.
bool is_name(const std::string& name) {
  return !name.empty() && name.size() <= kLongestName && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return c < 0x80 && (std::isalnum(c) || c == '_' || c == '-');
  });
}

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
    const bool is_served = has_adapter(folder, name) || torchgraft::is_setup_directory(entry.path().string());
    if (is_name(name) && is_served) {
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
  const auto add = [&](const std::string& name, const std::filesystem::path& directory) {
    const auto config = torchgraft::check_adapter_directory(directory.string(), file_bytes);
    torchgraft::check_supported(config);
    configs[torchgraft::config_to_json(config)].push_back(name);
  };
  for (const std::string& name : names_in(folder)) {
    if (own.count(name)) {
      log_line("adapter " + name + " of the model's file is served; that of the folder is not: rename one of the two");
      continue;
    }
    try {
      if (has_adapter(folder, name)) {
        add(name, folder / name);
        continue;
      }
      for (const std::string& part :
           torchgraft::adapters_in(torchgraft::read_adapter_setup((folder / name).string()))) {
        add(name, folder / name / part);
      }
    } catch (const std::exception& error) {
      report(name, error.what());
    }
  }
  return configs;
}

torchgraft::AdapterPoolOptions pool_options(const torch::jit::Module& module, const std::filesystem::path& folder,
                                            torchgraft::AdapterPoolOptions options, uint64_t file_bytes) {
  if (options.fixed_banks) {
    return options;
  }
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
  } catch (const torchgraft::RowsInUse& error) {
    throw RequestError(503, torchgraft::one_line(error));
  } catch (const c10::Error& error) {
    throw RequestError(422, "adapter '" + name + "' cannot be loaded: " + torchgraft::one_line(error));
  }
}

// "Stack(a, b)" of a request.
torchgraft::Composition composition_of(const std::string& text) {
  if (text.size() > kLongestText) {
    throw RequestError(400, "expected a composition of at most " + std::to_string(kLongestText) + " characters, got " +
                                std::to_string(text.size()));
  }
  try {
    return torchgraft::composition_from_string(text);
  } catch (const c10::Error& error) {
    throw RequestError(400, torchgraft::one_line(error));
  }
}

}  // namespace

std::string metric_label(const std::string& adapter) {
  return torchgraft::is_composition_text(adapter) ? "(composition)" : adapter;
}

bool is_grafted(const torch::jit::Module& module) { return module.find_method("adapter_names").has_value(); }

AdapterStore::AdapterStore(const torch::jit::Module& module, std::filesystem::path folder,
                           const torchgraft::AdapterPoolOptions& options, uint64_t file_bytes)
    : folder_(std::move(folder)),
      file_bytes_(file_bytes),
      own_(own_configs(module)),
      pool_(module, pool_options(module, folder_, options, file_bytes),
            [this](const std::string& name) { return read(name); }),
      setups_(folder_, pool_, file_bytes) {
  if (options.fixed_banks) {
    report_misfits();
  }
}

void AdapterStore::report_misfits() const {
  for (const auto& [json, names] : read_configs(folder_, own_, file_bytes_)) {
    std::string fault;
    try {
      const std::string lacks = pool_.misfit(torchgraft::config_from_json(json));
      fault = lacks.empty() ? "" : "there is " + lacks + "; make the package for its configuration, too (--room)";
    } catch (const c10::Error& error) {
      fault = error.what_without_backtrace();
    }
    for (const std::string& name : fault.empty() ? std::vector<std::string>() : names) {
      report(name, fault);
    }
  }
}

AdapterSpec AdapterStore::read(const std::string& name) const {
  if (Setups::is_part(name)) {
    return setups_.read(name);
  }
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
  if (torchgraft::is_composition_text(name)) {
    check_composition(name);
    return;
  }
  if (!is_name(name)) {
    throw RequestError(404, "expected an adapter's name of letters, digits, '_' and '-', got '" + name + "'");
  }
  if (is_removed(name)) {
    throw RequestError(404, "no adapter is called '" + name + "'");
  }
}

// The adapters of a composition that stands in a request; of a name, the name.
std::vector<std::string> AdapterStore::parts_of(const std::string& name) const {
  const bool is_text = !own_.count(name) && torchgraft::is_composition_text(name);
  return is_text ? torchgraft::adapters_in(composition_of(name)) : std::vector<std::string>{name};
}

void AdapterStore::check_composition(const std::string& text) const {
  for (const std::string& part : parts_of(text)) {
    if (torchgraft::is_composition_text(part)) {
      throw RequestError(404, "no adapter is called '" + part + "'");
    }
    check_name(part);
  }
}

void AdapterStore::check_in_folder(const std::string& name) const {
  for (const std::string& part : parts_of(name)) {
    const bool is_whole = part == name && setups_.is_setup(name);
    if (!own_.count(part) && !has_adapter(folder_, part) && !is_whole) {
      throw RequestError(setups_.is_setup(part) ? 422 : 404,
                         setups_.is_setup(part) ? "'" + part + "' is a composition, which cannot be part of another"
                                                : "no adapter is called '" + part + "'");
    }
  }
}

std::optional<AdapterPool::Lease> AdapterStore::try_acquire(const std::string& name) {
  if (!name.empty()) {
    check_name(name);
  }
  return answered(name, [&] { return pool_.try_acquire({name}); });
}

AdapterPool::Lease AdapterStore::acquire(const std::string& name) {
  if (auto lease = try_acquire(name)) {
    return std::move(*lease);
  }
  check_in_folder(name);
  return answered(name, [&] {
    const bool is_text = torchgraft::is_composition_text(name);
    if (!is_text && !own_.count(name) && !has_adapter(folder_, name) && !setups_.is_loaded(name)) {
      setups_.load(name);
    }
    return pool_.acquire({name});
  });
}

void AdapterStore::load(const std::string& name) {
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  if (folder_.empty()) {
    throw RequestError(404, "the server has no folder of adapters; start it with --adapters FOLDER");
  }
  if (!is_name(name) || !(has_adapter(folder_, name) || setups_.is_setup(name))) {
    throw RequestError(404, "no adapter of that name is in the folder");
  }
  answered(name, [&] {
    if (!has_adapter(folder_, name)) {
      setups_.load(name);
      return;
    }
    const AdapterSpec spec = read(name);
    setups_.remove(name);  // a composition that the directory held before
    pool_.insert(spec);
  });
  const std::lock_guard lock(mutex_);
  removed_.erase(name);
}

void AdapterStore::remove(const std::string& name) {
  check_name(name);
  if (own_.count(name)) {
    throw RequestError(409, "adapter '" + name + "' is part of the model's file");
  }
  if (torchgraft::is_composition_text(name)) {
    throw RequestError(404, "'" + name + "' has no name that could be removed");
  }
  if (!setups_.is_loaded(name) && !pool_.try_acquire({name})) {
    check_in_folder(name);
  }
  {
    const std::lock_guard lock(mutex_);
    removed_.insert(name);
  }
  if (!setups_.remove(name)) {
    pool_.evict(name);
  }
}

std::vector<AdapterStore::Info> AdapterStore::list() const {
  std::set<std::string> resident, names;
  for (const std::string& name : pool_.resident()) {
    if (!Setups::is_part(name)) {
      resident.insert(name);
    }
  }
  for (const auto& [name, text] : pool_.compositions()) {
    resident.insert(name);
  }
  names = resident;
  for (const auto& [name, config] : own_) {
    names.insert(name);
  }
  for (const std::string& name : names_in(folder_)) {
    names.insert(name);
  }
  std::vector<Info> result;
  for (const std::string& name : names) {
    if (own_.count(name) || !is_removed(name)) {
      result.push_back({name, resident.count(name) > 0});
    }
  }
  return result;
}

std::string AdapterStore::config(const std::string& name) const {
  check_name(name);
  if (const auto own = own_.find(name); own != own_.end()) {
    return own->second;
  }
  if (torchgraft::is_composition_text(name)) {
    return torchgraft::composition_to_json(composition_of(name));
  }
  check_in_folder(name);
  if (!has_adapter(folder_, name)) {
    return answered(name, [&] {
      return torchgraft::composition_to_json(torchgraft::read_adapter_setup((folder_ / name).string()));
    });
  }
  return answered(
      name, [&] { return torchgraft::config_to_json(torchgraft::read_adapter_config((folder_ / name).string())); });
}
