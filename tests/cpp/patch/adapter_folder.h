#pragma once

#include "encoder.h"

#include <torchgraft/patch/adapter_pool.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/plan/safetensors.h>

#include <unistd.h>

#include <filesystem>

// Adapters for encoder(). No two of them compute the same.
namespace torchgraft::testing {

// Random weights of a scale that changes every output and leaves gates between 0 and 1.
inline StateDict random_like(const StateDict& weights, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  StateDict result;
  for (const auto& [key, value] : weights) {
    result[key] = at::randn(value.sizes(), generator, value.options()) * 0.3;
  }
  return result;
}

inline AdapterSpec made_of(const std::string& config, const std::string& name, uint64_t seed = 0) {
  const AdapterFiles files =
      adapter_files(graft(encoder(), {{"a", config_from_string(config), std::nullopt, ""}}), "a");
  const uint64_t own = seed + std::hash<std::string>()(name + config);
  return {name, config_from_json(files.config), random_like(files.weights, own), "a"};
}

inline at::Tensor run_rows(const torch::jit::Module& module, const at::Tensor& x, const std::vector<int64_t>& ids) {
  at::NoGradGuard no_grad;
  return module.get_method("forward")({x}, {{"adapter_ids", at::tensor(ids, at::kLong)}}).toTensor();
}

// `count` adapters of one configuration, each in a directory of its own as AdapterHub keeps it.
class AdapterFolder {
 public:
  AdapterFolder(const std::string& config, int64_t count) : count_(count) {
    path_ = std::filesystem::temp_directory_path() / ("torchgraft_adapters_" + std::to_string(getpid()));
    const AdapterFiles files =
        adapter_files(graft(encoder(), {{"saved", config_from_string(config), std::nullopt, ""}}), "saved");
    for (int64_t i = 0; i < count; ++i) {
      const auto directory = path_ / name_of(i);
      std::filesystem::create_directories(directory);
      write_safetensors(random_like(files.weights, static_cast<uint64_t>(i)), directory / "adapter.safetensors");
      write_file(directory / "adapter_config.json", files.config);
    }
  }
  AdapterFolder(const AdapterFolder&) = delete;
  AdapterFolder& operator=(const AdapterFolder&) = delete;
  ~AdapterFolder() { std::filesystem::remove_all(path_); }

  static std::string name_of(int64_t number) { return "adapter_" + std::to_string(number); }

  AdapterSpec read(const std::string& name) const { return read_adapter_directory(path_ / name, name); }

  AdapterPool::Loader loader() const {
    return [this](const std::string& name) { return read(name); };
  }

  // One module with all adapters, made by graft(): adapter i is name_of(i).
  torch::jit::Module graft_all() const {
    std::vector<AdapterSpec> specs;
    for (int64_t i = 0; i < count_; ++i) {
      specs.push_back(read(name_of(i)));
    }
    return graft(encoder(), specs);
  }

 private:
  int64_t count_;
  std::filesystem::path path_;
};

}  // namespace torchgraft::testing
