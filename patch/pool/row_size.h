#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// What an adapter of this plan needs for its large matrices alone.
double least_bytes(const Plan& plan, const at::TensorOptions& options);

// Throws c10::Error when an adapter of this plan needs more than `limit` bytes for its large matrices alone; 0 is no
// limit. Allocates nothing: a plan may ask for more memory than there is.
void check_least_bytes(const Plan& plan, const at::TensorOptions& options, int64_t limit);

// Throws c10::Error that says what rows of so many bytes need.
void check_row_limit(double bytes, int64_t limit);

// The size of rows that can hold each of several adapters.
class RowSize {
 public:
  void add(const Adapter& adapter);
  double bytes() const;

 private:
  struct Parameter {
    std::vector<int64_t> sizes;
    double element_size = 0;
    std::vector<size_t> sharers = {};  // of VeRA's lora_a: the adapters, in whose other slots it is the same bank
  };

  std::map<std::string, Parameter> parameters_;  // by slot and name
  size_t adapters_ = 0;
};

}  // namespace torchgraft
