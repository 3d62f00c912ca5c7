#include "setups.h"

#include <torchgraft/patch/read_adapter.h>

#include <c10/util/Exception.h>
#include <sys/stat.h>

#include <chrono>
#include <thread>
#include <utility>

namespace {

using torchgraft::AdapterSpec;
using torchgraft::BlockKind;
using torchgraft::Composition;

constexpr int kTries = 20;  // another process may save the composition meanwhile
constexpr std::chrono::milliseconds kBetween(50);

// The tree with `begin` before each adapter's name.
Composition with_prefix(Composition tree, const std::string& begin) {
  if (tree.kind == BlockKind::kAdapter) {
    tree.name = begin + tree.name;
  }
  for (Composition& child : tree.children) {
    child = with_prefix(std::move(child), begin);
  }
  return tree;
}

// The name of a directory within the composition's: it leads nowhere else.
void check_part(const std::string& part) {
  TORCH_CHECK(!part.empty() && part != "." && part != ".." && part.find('/') == std::string::npos, "the adapter '",
              part, "' of the composition has a name that no directory can have");
}

}  // namespace

Setups::Setups(std::filesystem::path folder, torchgraft::AdapterPool& pool, uint64_t file_bytes)
    : folder_(std::move(folder)), pool_(pool), file_bytes_(file_bytes) {}

bool Setups::is_setup(const std::string& name) const {
  return !folder_.empty() && torchgraft::is_setup_directory((folder_ / name).string());
}

bool Setups::is_loaded(const std::string& name) const {
  const std::lock_guard lock(mutex_);
  return loaded_.count(name) > 0;
}

Setups::Stamp Setups::stamp_of(const std::string& name, const Composition& tree) const {
  Stamp stamp;
  const auto add = [&](const std::filesystem::path& path) {
    struct stat found = {};
    if (stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode)) {
      stamp.push_back(path.string() + " " + std::to_string(found.st_ino) + " " + std::to_string(found.st_mtim.tv_sec) +
                      "." + std::to_string(found.st_mtim.tv_nsec) + " " + std::to_string(found.st_size));
    }
  };
  add(folder_ / name / "adapter_setup.json");
  for (const std::string& part : torchgraft::adapters_in(tree)) {
    for (const char* file :
         {"adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"}) {
      add(folder_ / name / part / file);
    }
  }
  return stamp;
}

// Reads again as long as another process replaces files.
std::vector<AdapterSpec> Setups::read_all(const std::string& name, const std::string& key, Version& version,
                                          Composition& tree) const {
  const std::string directory = (folder_ / name).string();
  for (int i = 0; i < kTries; ++i) {
    tree = torchgraft::read_adapter_setup(directory);
    version = {name, stamp_of(name, tree), {}};
    std::vector<AdapterSpec> specs;
    for (const std::string& part : torchgraft::adapters_in(tree)) {
      check_part(part);
      version.parts.push_back(key + "/" + part);
      specs.push_back(torchgraft::read_adapter_directory(directory + "/" + part, version.parts.back(), file_bytes_));
    }
    if (stamp_of(name, tree) == version.stamp) {
      return specs;
    }
    std::this_thread::sleep_for(kBetween);
  }
  TORCH_CHECK(false, directory, ": its files change all the time; try again when they are saved");
}

void Setups::load(const std::string& name) {
  std::string key;
  {
    const std::lock_guard lock(mutex_);
    key = name + "@" + std::to_string(++loads_);
  }
  Version version;
  Composition tree;
  const std::vector<AdapterSpec> specs = read_all(name, key, version, tree);
  tree = with_prefix(std::move(tree), key + "/");
  {
    const std::lock_guard lock(mutex_);
    versions_[key] = version;
  }
  try {
    for (const AdapterSpec& spec : specs) {
      pool_.insert(spec);
    }
    pool_.acquire({torchgraft::composition_to_string(tree)});  // or says why it cannot be had
    pool_.evict(name);                                         // an adapter that the directory held before
    pool_.compose(name, tree);
  } catch (...) {
    forget(key);
    throw;
  }
  std::string old;
  {
    const std::lock_guard lock(mutex_);
    old = std::exchange(loaded_[name], key);
  }
  forget(old);
}

bool Setups::remove(const std::string& name) {
  std::string key;
  {
    const std::lock_guard lock(mutex_);
    const auto found = loaded_.find(name);
    if (found == loaded_.end()) {
      return false;
    }
    key = found->second;
    loaded_.erase(found);
  }
  pool_.remove_composition(name);
  forget(key);
  return true;
}

void Setups::forget(const std::string& key) {
  Version version;
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = versions_.find(key); found != versions_.end()) {
      version = std::move(found->second);
      versions_.erase(found);
    }
  }
  for (const std::string& part : version.parts) {
    pool_.evict(part);
  }
}

AdapterSpec Setups::read(const std::string& part) const {
  const size_t slash = part.find('/');
  Version version;
  {
    const std::lock_guard lock(mutex_);
    const auto found = versions_.find(part.substr(0, slash));
    TORCH_CHECK(found != versions_.end(), "the composition of '", part, "' was replaced meanwhile; ask again");
    version = found->second;
  }
  const std::string directory = (folder_ / version.name).string();
  const auto check = [&] {
    TORCH_CHECK(stamp_of(version.name, torchgraft::read_adapter_setup(directory)) == version.stamp, directory,
                ": its files are not those that were loaded; PUT the composition again, so that all of its adapters ",
                "are of one version");
  };
  check();
  AdapterSpec spec = torchgraft::read_adapter_directory(directory + "/" + part.substr(slash + 1), part, file_bytes_);
  check();
  return spec;
}
