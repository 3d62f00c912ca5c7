#pragma once

#include <ATen/Parallel.h>
#include <torchgraft/ops/bank.h>

#include <algorithm>
#include <vector>

namespace torchgraft::ops::cpu {

// Neighbouring tokens of one adapter: all of the batch when its rows agree, else one row.
struct TokenRuns {
  int64_t tokens = 0;             // of each run
  std::vector<int64_t> adapters;  // by run; -1: none

  int64_t count() const { return static_cast<int64_t>(adapters.size()); }
};

// For batch rows of `tokens` tokens. Not for a base selection.
TokenRuns token_runs(const Selection& selection, int64_t batch, int64_t tokens);

// A bank's slices, [N, ...] float32; null pointers of an undefined bank. Contiguous banks are read where they are.
class BankSlices {
 public:
  explicit BankSlices(const at::Tensor& bank);
  const float* of(int64_t adapter) const { return first_ == nullptr ? nullptr : first_ + adapter * size_; }

 private:
  at::Tensor bank_;
  const float* first_ = nullptr;
  int64_t size_ = 0;  // elements of one adapter
};

// Calls work(run, first token, end token) for tiles of all runs, on all threads. A token's result must not depend on
// the tile that it is in.
template <typename Work>
void for_each_tile(const TokenRuns& runs, const Work& work) {
  constexpr int64_t kTile = 64;      // a tile of x, and of the result, stay in the second cache
  constexpr int64_t kSmallest = 12;  // rows: less feeds the register blocks badly
  const int64_t all = runs.count() * runs.tokens;
  const int64_t share = (all + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t tile = std::clamp(share, kSmallest, kTile);
  const int64_t per_run = (runs.tokens + tile - 1) / tile;
  at::parallel_for(0, runs.count() * per_run, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_run * tile;
      work(i / per_run, first, std::min(runs.tokens, first + tile));
    }
  });
}

}  // namespace torchgraft::ops::cpu
