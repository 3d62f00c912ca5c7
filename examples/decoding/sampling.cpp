#include "sampling.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <algorithm>
#include <stdexcept>
#include <string>

Sampler::Sampler(const SamplingOptions& options, int64_t rows) : options_(options) {
  for (int64_t row = 0; row < rows; ++row) {
    generators_.push_back(at::make_generator<at::CPUGeneratorImpl>(options.seed + static_cast<uint64_t>(row)));
  }
}

int64_t Sampler::choose(int64_t row, const at::Tensor& logits) {
  if (!logits.isfinite().any().item<bool>() || logits.isnan().any().item<bool>()) {
    throw std::runtime_error("row " + std::to_string(row) + ": no token can be chosen, its logits are not numbers");
  }
  if (options_.greedy) {
    return logits.argmax(-1).item<int64_t>();
  }
  auto [sorted, tokens] = (logits.to(at::kDouble) / options_.temperature).sort(-1, /*descending=*/true);
  if (options_.top_k > 0) {
    sorted = sorted.slice(0, 0, std::min(options_.top_k, sorted.size(0)));
  }
  at::Tensor probabilities = sorted.softmax(-1);
  // A token stays while those before it have less than top_p together: at least the likeliest does.
  const at::Tensor before = probabilities.cumsum(-1) - probabilities;
  probabilities = probabilities.masked_fill(before >= options_.top_p, 0.0);
  const at::Tensor chosen = probabilities.multinomial(1, /*replacement=*/false, generators_.at(row));
  return tokens[chosen.item<int64_t>()].item<int64_t>();
}
