#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Replaces operators that write in place by operators that do not, where alias analysis proves that no other value
// changes:
//   scores.masked_fill_(mask, c)                  scores = scores.masked_fill(mask, c)
//   if mask is not None: scores.add_(mask)        scores = scores + mask if mask is not None else scores
//   scores[..., 0] = c, k[:, :4] *= s             scores = select_scatter(scores, c, -1, 0), ...
// The write must go into a tensor that this graph has made, directly or through a chain of select, slice, transpose and
// view, and no other value that may share its memory may be read behind the write. torch::jit::RemoveTensorMutation
// does the same for tensors without views, outside of branches.
//
// A write without such a proof stays: later passes leave values alone that are written in place (graph/writes.h).
void remove_writes(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
