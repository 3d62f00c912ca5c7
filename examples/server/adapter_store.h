#pragma once

#include "model.h"

#include <torchgraft/patch/adapter_pool.h>

#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// A request that cannot be served, and the status of the answer.
struct RequestError : std::runtime_error {
  RequestError(int code, const std::string& message) : std::runtime_error(message), status(code) {}
  int status;
};

// A folder of adapter directories (adapter_config.json, adapter.safetensors) and those of them that are in memory.
class AdapterStore {
 public:
  // `module` is a base model or a grafted one. Rows are made for the configurations in the folder, whatever
  // `options.room` says. options.graft is for a base: with gate_pooling "unpadded" an answer does not depend on what
  // else is in its batch. A grafted module keeps its own. Throws when the folder cannot be read.
  AdapterStore(const torch::jit::Module& module, std::filesystem::path folder,
               const torchgraft::AdapterPoolOptions& options);

  // A lease on one adapter, or on the base model when `name` is empty. The first does not wait: nullopt when the
  // adapter has to be fetched. Throws RequestError 404 for a name that there is not, 422 when its files are damaged or
  // do not fit.
  std::optional<torchgraft::AdapterPool::Lease> try_acquire(const std::string& name);
  torchgraft::AdapterPool::Lease acquire(const std::string& name);

  // Reads the adapter from its directory, anew if it is in memory. Throws as acquire() does; then the old one stays.
  void load(const std::string& name);

  // Serves the adapter no more until it is loaded again; its files stay. Throws RequestError 404, or 409 for one that
  // is part of the model's file.
  void remove(const std::string& name);

  struct Info {
    std::string name;
    bool resident = false;
  };
  std::vector<Info> list() const;                     // sorted; throws when the folder cannot be read
  std::string config(const std::string& name) const;  // JSON; throws as acquire() does
  bool is_served(const std::string& name) const;

  torchgraft::AdapterPoolStats stats() const { return pool_.stats(); }

 private:
  torchgraft::AdapterSpec read(const std::string& name) const;
  void check_served(const std::string& name) const;

  const std::filesystem::path folder_;
  const std::map<std::string, std::string> own_;  // name -> config, of those in the model's file
  torchgraft::AdapterPool pool_;
  mutable std::mutex mutex_;
  std::set<std::string> removed_;
};
