#pragma once

#include <torchgraft/patch/adapter_pool.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

// The compositions of a folder: directories with an adapter_setup.json, in which each adapter has a directory of its
// own. In the pool such an adapter is called NAME@VERSION/ADAPTER: a composition runs adapters of one version, and no
// request can name them.
class Setups {
 public:
  // `pool` must outlive it, and calls read() for names in which is_part() sees a slash.
  Setups(std::filesystem::path folder, torchgraft::AdapterPool& pool, uint64_t file_bytes);

  bool is_setup(const std::string& name) const;  // looks into the folder
  static bool is_part(const std::string& name) { return name.find('/') != std::string::npos; }

  // Reads the composition and its adapters, even if they are in memory, and gives it its name. Throws c10::Error; then
  // the old one stays.
  void load(const std::string& name);

  // Returns false when no composition of that name was loaded.
  bool remove(const std::string& name);
  bool is_loaded(const std::string& name) const;

  // An adapter that was evicted. Throws c10::Error when the directory is not what load() read.
  torchgraft::AdapterSpec read(const std::string& part) const;

 private:
  // When the files were changed last: differs for different versions.
  using Stamp = std::vector<std::string>;
  struct Version {
    std::string name;
    Stamp stamp;
    std::vector<std::string> parts;  // as the pool calls them
  };

  Stamp stamp_of(const std::string& name, const torchgraft::Composition& tree) const;
  std::vector<torchgraft::AdapterSpec> read_all(const std::string& name, const std::string& key, Version& version,
                                                torchgraft::Composition& tree) const;
  void forget(const std::string& key);

  const std::filesystem::path folder_;
  torchgraft::AdapterPool& pool_;
  const uint64_t file_bytes_;
  mutable std::mutex mutex_;
  uint64_t loads_ = 0;
  std::map<std::string, Version> versions_;    // by key, NAME@VERSION
  std::map<std::string, std::string> loaded_;  // name -> key
};
