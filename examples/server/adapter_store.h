#pragma once

#include "model.h"
#include "predict_request.h"
#include "setups.h"

#include <torchgraft/patch/adapter_pool.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

bool is_grafted(const torch::jit::Module& module);

// A name in the metrics. Compositions that stand in requests count together: there are more than a table should hold.
std::string metric_label(const std::string& adapter);

// The adapters and compositions of a folder, one directory each (adapter_config.json, adapter.safetensors;
// adapter_setup.json), and of the model's file. A pool holds some of them in memory. Wherever a name is asked for, it
// may be the text of a composition of such adapters: "Stack(en, ner)".
class AdapterStore {
 public:
  // `module` is a base model or a grafted one. An empty `folder` is none: then there are only those of the model's
  // file. The pool makes rows for those configurations in the folder that fit, and ignores `options.room`; with
  // fixed_banks it makes them for `options.room` alone. One line on stderr names each adapter that cannot be served,
  // and why. With gate_pooling "unpadded" in `options.graft` an answer does not depend on the rest of its batch; empty,
  // each adapter keeps the one that it was trained with. A line on stderr names each that is loaded with another one.
  // file_bytes: the most that a file of weights may have. Throws when it cannot read the folder, and when the module
  // has adapters of another gate_pooling than asked for.
  AdapterStore(const torch::jit::Module& module, std::filesystem::path folder,
               const torchgraft::AdapterPoolOptions& options, uint64_t file_bytes);

  // A lease on one adapter, or on the base model when `name` is empty. try_acquire() neither waits nor looks into the
  // folder: it returns nullopt when the adapter is not in memory. So adapters in memory are served while the folder is
  // away. Both throw RequestError: 404 for an unknown name, 422 when the adapter's files are damaged or do not fit the
  // model; acquire() also 503 when others keep all rows longer than the pool's options allow.
  std::optional<torchgraft::AdapterPool::Lease> try_acquire(const std::string& name);
  torchgraft::AdapterPool::Lease acquire(const std::string& name);

  // Reads the adapter from its directory, even if it is in memory. Throws as acquire() does; then the old one stays.
  void load(const std::string& name);

  // Stops serving the adapter until load() reads it again; its files stay. Throws RequestError: 404 for an unknown
  // name, 409 for an adapter of the model's file.
  void remove(const std::string& name);

  struct Info {
    std::string name;
    bool resident = false;
  };
  std::vector<Info> list() const;                     // sorted; throws when it cannot read the folder
  std::string config(const std::string& name) const;  // JSON; throws as acquire() does
  torchgraft::AdapterPoolStats stats() const { return pool_.stats(); }
  torchgraft::AdapterPool& pool() { return pool_; }

 private:
  void report_misfits() const;
  torchgraft::AdapterSpec read(const std::string& name) const;
  bool is_removed(const std::string& name) const;
  void check_name(const std::string& name) const;
  void check_composition(const std::string& text) const;
  void check_in_folder(const std::string& name) const;
  std::vector<std::string> parts_of(const std::string& name) const;

  const std::filesystem::path folder_;
  const uint64_t file_bytes_;
  const std::map<std::string, std::string> own_;  // name -> config of the adapters in the model's file
  torchgraft::AdapterPool pool_;
  Setups setups_;
  mutable std::mutex mutex_;
  std::set<std::string> removed_;
};
