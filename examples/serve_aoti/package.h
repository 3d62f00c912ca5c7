#pragma once

#include "../package_banks.h"
#include "../serve/model.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

// A grafted TorchScript file: its banks, by the names that a package of it has for them, and of each adapter the name
// and the tokens that its gates are means over.
struct BankFile {
  Banks banks;
  std::vector<std::string> adapters;
};

// A package of `torchgraft export --aoti`, and the description that it carries.
class Package {
 public:
  // Throws std::runtime_error or c10::Error, also for a package of a pool: its banks hold no adapter yet.
  explicit Package(const std::string& path);

  std::vector<std::string> adapter_names() const;  // adapter_ids index this list

  // One pass. ids: one adapter for each row, -1 for the base; empty for a package without adapter_ids.
  Response run(std::vector<at::Tensor> inputs, const std::vector<int64_t>& ids);

  // Makes the package use other banks: those of its constants that `banks` has. Nobody may run it meanwhile. Throws
  // std::runtime_error, and changes nothing, when a bank is missing or has another size than in `like`, when layers
  // share their banks otherwise, or when an adapter's gates are means over other tokens, which the package's code has
  // fixed.
  void swap_banks(const BankFile& file, const BankFile& like);

 private:
  std::vector<AdapterGates> gates_of(const std::vector<at::Tensor>& outputs, const std::vector<int64_t>& ids) const;

  const nlohmann::json description_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

BankFile read_banks(const std::string& path);
