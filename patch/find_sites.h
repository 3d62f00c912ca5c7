#pragma once

#include <torchgraft/patch/canonicalise.h>
#include <torchgraft/patch/symbolic_shape.h>
#include <torchgraft/plan/structure.h>

#include <optional>
#include <vector>

namespace torchgraft {

// Where in the graph the places of a Layer are. Pointers are into the canonical graph.

// A linear map: node->input(0) is its input, node->output() its result, of which columns
// [offset, offset + out_features) are this projection's.
struct LinearSite {
  torch::jit::Node* node = nullptr;
  bool sequence_first = false;  // tokens before batch: [S, B, features]
};

// add = branch + residual, and the norm of the sum when the order is post-norm.
struct ResidualSite {
  torch::jit::Node* add = nullptr;
  size_t branch_operand = 0;
  torch::jit::Node* norm = nullptr;
  bool sequence_first = false;

  torch::jit::Value* branch() const { return add->input(branch_operand); }
  torch::jit::Value* residual() const { return add->input(1 - branch_operand); }
};

struct LayerSites {
  torch::jit::Node* attention = nullptr;  // aten::scaled_dot_product_attention
  LinearSite query, key, value;
  std::optional<LinearSite> output, ffn_in, ffn_out;
  std::optional<ResidualSite> attention_residual, ffn_residual;
};

struct GraphSites {
  Structure structure;
  std::vector<LayerSites> layers;  // parallel to structure.layers
};

// Finds layers by data flow, from each attention outwards: its projections, the residual add and norm around it, and
// the feed-forward block behind them. Names play no part.
GraphSites find_sites(const CanonicalGraph& canonical, const torch::jit::Module& module);

}  // namespace torchgraft
