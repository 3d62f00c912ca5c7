#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

struct SamplingOptions {
  bool greedy = true;
  double temperature = 1.0;
  int64_t top_k = 0;   // 0: all tokens
  double top_p = 1.0;  // the likeliest tokens that have this probability together
  uint64_t seed = 0;
};

// Chooses tokens. Each row of a batch has random numbers of its own, so that what is chosen for it does not depend on
// the other rows.
class Sampler {
 public:
  Sampler(const SamplingOptions& options, int64_t rows);

  // The next token of `row`, from logits [vocabulary].
  int64_t choose(int64_t row, const at::Tensor& logits);

 private:
  SamplingOptions options_;
  std::vector<at::Generator> generators_;
};
