#pragma once

#include <torchgraft/patch/module/trial_run.h>

#include <cstdint>
#include <vector>

namespace torchgraft {

// The numbers of rows that the adapted layers may see, likeliest first: the first sizes of tensors among `arguments`,
// the second, lengths of lists, one row, and products of two sizes, where dimensions are joined.
std::vector<int64_t> row_counts(const Arguments& arguments);

}  // namespace torchgraft
