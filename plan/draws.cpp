#include <torchgraft/plan/draws.h>

#include <ATen/ATen.h>

#include <cmath>

namespace torchgraft {

void fix_seed(const std::optional<int64_t>& seed) {
  if (seed && *seed != 0) {
    at::manual_seed(static_cast<uint64_t>(*seed));
  }
}

at::Tensor uniform_within(at::IntArrayRef sizes, double bound) { return at::empty(sizes).uniform_(-bound, bound); }

// The steps are torch's: another order rounds otherwise.
at::Tensor kaiming_uniform(at::IntArrayRef sizes, double slope) {
  const double gain = std::sqrt(2.0 / (1.0 + slope * slope));
  const double std = gain / std::sqrt(static_cast<double>(sizes[1]));
  return uniform_within(sizes, std::sqrt(3.0) * std);
}

at::Tensor linear_weight(int64_t out, int64_t in) { return kaiming_uniform({out, in}, std::sqrt(5.0)); }

at::Tensor linear_bias(int64_t out, int64_t in) {
  return uniform_within({out}, 1.0 / std::sqrt(static_cast<double>(in)));
}

}  // namespace torchgraft
