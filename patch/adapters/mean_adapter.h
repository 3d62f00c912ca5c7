#pragma once

#include <torchgraft/patch/adapters/adapter.h>

#include <vector>

namespace torchgraft {

// The frozen adapter whose trained numbers are the sums over i of shares[i] times those of sources[i]. All else is that
// of the first: the configurations are equal. It has no head, and no norms of DoRA, which build() computes.
Adapter mean_adapter(const std::vector<Adapter>& sources, const std::vector<double>& shares);

// Throws c10::Error, on behalf of average_adapter(), unless the weights of `mean` are those sums, up to the rounding of
// their dtype.
void check_is_mean(const Adapter& mean, const std::vector<Adapter>& sources, const std::vector<double>& shares);

}  // namespace torchgraft
