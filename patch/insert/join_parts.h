#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <vector>

namespace torchgraft {

// What LoRAs change of one packed projection: node i of `reads` (aten::narrow) takes columns of the result, and node i
// of `writes` (aten::slice_scatter) puts the changed ones back. The writes follow each other.
struct PackedParts {
  int64_t columns = 0;  // of the projection; 0: not known
  std::vector<torch::jit::Node*> reads;
  std::vector<torch::jit::Node*> writes;
};

// Makes one aten::cat of all writes, so that a result is copied once and not for each LoRA. Does nothing where the
// writes are not all of results of gated_lora, which have the projection's dtype, in columns of their own. Destroys the
// writes that it replaces.
void join_parts(torch::jit::Graph& graph, const PackedParts& parts);

}  // namespace torchgraft
