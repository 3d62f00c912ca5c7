#pragma once

#include "../package_banks.h"

#include <torchgraft/config/adapter_config.h>

#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// What an AOTInductor package of a pool says of itself: `torchgraft export BASE.pt --pool N --aoti OUT.aoti.pt2`.
struct PackageForm {
  struct Range {
    int64_t least = 0;
    int64_t most = 0;
  };
  struct Input {
    std::string name;
    std::vector<Range> sizes;
  };
  int64_t capacity = 0;                         // rows of its banks
  std::vector<torchgraft::AdapterConfig> room;  // what each row can hold
  std::string base;                             // base_digest() of the model
  std::vector<std::string> banks;               // those that it reads
  std::vector<Input> inputs;                    // the last one is adapter_ids
};

// Loads none of the package's code. Throws c10::Error for a file that is no package of a pool, or one of another torch
// or torchgraft.
PackageForm read_package_form(const std::string& path);

// Throws c10::Error unless the package takes batches of up to `rows` rows of up to `tokens` tokens.
void check_sizes(const PackageForm& form, size_t rows, size_t tokens);

// A package that is loaded. It reads the banks of a pool's module: whoever writes a row there writes it in the package,
// and the pool's rule holds for both, that nobody writes a row while a pass uses it.
class Package {
 public:
  // Loads the package's code. passes: how many may run at once. Throws c10::Error or std::runtime_error.
  Package(const std::string& path, PackageForm form, size_t passes);

  // From now on passes read the banks of `module`, which stay in memory as long as the package. Call it before the
  // first pass. Throws c10::Error when a bank is missing, or has other sizes than in the package.
  void read_banks_of(const torch::jit::Module& module);

  // One pass, of any thread. arguments: forward's; those that are no tensors were fixed when the package was made.
  // Returns the first tensor of its result.
  at::Tensor run(const std::vector<c10::IValue>& arguments, const at::Tensor& adapter_ids);

  // The fewest tokens of a pass: exported programs mostly take two or more. Shorter rows are padded where that changes
  // no answer: unless gates are means over all tokens.
  size_t least_tokens() const { return least_tokens_; }
  bool pads_rows() const { return pads_rows_; }

 private:
  void check_slots(const Banks& held, const std::vector<std::string>& constants) const;

  const std::string path_;
  const PackageForm form_;
  const size_t least_tokens_;
  const bool pads_rows_;
  torch::inductor::AOTIModelPackageLoader loader_;
  Banks banks_;
};
