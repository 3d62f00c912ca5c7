#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// Replaces operators that write in place by operators that do not, where alias analysis proves that nobody can tell:
//   scores.masked_fill_(mask, c)                  scores = scores.masked_fill(mask, c)
//   if mask is not None: scores.add_(mask)        scores = scores + mask if mask is not None else scores
//   scores[..., 0] = c, k[:, :4] *= s             scores = select_scatter(scores, c, -1, 0), ...
// Written is a tensor that was made in this graph, itself or through a chain of select, slice, transpose and view; no
// other value that may share its memory is read behind the write. torch::jit::RemoveTensorMutation does the same for
// tensors without views and outside of branches.
//
// What cannot be proven stays: the passes behind this one leave alone what is written in place (writes.h).
void remove_writes(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
