#pragma once

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/plan/structure.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// The sites of a Layer in the graph. Pointers are into the canonical graph.

// A linear map, or some of its columns: `node` is the aten::linear, and columns [offset, offset + width) of its output
// are this projection's.
//
// `elsewhere` are linear maps with the same weight on an input [1, P, features] that all rows of a batch share
// (DeBERTa's relative positions): a LoRA changes them too.
struct LinearSite {
  torch::jit::Node* node = nullptr;
  bool sequence_first = false;  // tokens before batch: [S, B, features]
  bool is_part = false;         // other columns belong to other projections
  bool is_row = false;          // its input is [B, features]: a pooler's, a classifier's
  bool is_lookup = false;       // an aten::embedding: its input is int64 [B, S], its weight [in, out]
  bool is_flat = false;  // its input is no [B, S, features], so that no LoRA can act here: rows [B * S, features]
  bool is_used_elsewhere = false;  // the weight has other linear maps still, which no LoRA here changes
  int64_t offset = 0;
  int64_t width = 0;
  int64_t packed_width = 0;  // of all columns of the node, where is_part; 0: not known
  std::vector<torch::jit::Node*> elsewhere = {};

  torch::jit::Value* input() const;
};

// What a block adds to the residual stream. `add` adds `branch` to `residual`, or to a sum that a later add brings
// there (parallel blocks add twice). The result of `sum` is the stream behind the block; `norm` is its norm in
// post-norm models.
struct ResidualSite {
  torch::jit::Node* add = nullptr;
  size_t branch_operand = 0;
  torch::jit::Value* residual = nullptr;
  torch::jit::Node* sum = nullptr;
  torch::jit::Node* norm = nullptr;
  bool sequence_first = false;

  torch::jit::Value* branch() const { return add->input(branch_operand); }
};

// The one value that leaves a Transformer layer: whatever comes behind the layer reads this.
struct LayerEnd {
  torch::jit::Value* value = nullptr;
  bool sequence_first = false;
};

struct LayerSites {
  torch::jit::Node* attention = nullptr;  // aten::scaled_dot_product_attention
  LinearSite query, key, value;           // key and value have no node where a cache is filled (CacheKind::kFilled)
  bool new_tokens_last = true;            // in a growing cache: this pass's keys come behind those of earlier ones
  bool keeps_inputs = false;              // a cache of what is projected to keys and values
  std::optional<LinearSite> output, ffn_in, ffn_gate, ffn_out;
  std::vector<LinearSite> linear_maps;  // parallel to Layer::linear_maps
  std::optional<ResidualSite> attention_residual, ffn_residual;
  std::optional<LayerEnd> end;
};

// The linear map of a LoRA site ("crossattn_lora_k", "output_lora"); null for sites of other methods, and for a site
// that the layer lacks.
const LinearSite* lora_site(const LayerSites& layer, const std::string& site);

// What an invertible adapter changes, [B, S, E] (or [S, B, E]): the embeddings as the first layer's residual stream, or
// the projection to it, reads them. A decoder behind an encoder has none.
struct EmbeddingSite {
  torch::jit::Value* value = nullptr;
  bool sequence_first = false;
  torch::jit::Node* output = nullptr;  // the linear map to the vocabulary, from a value of the same layout
  bool output_is_sequence_first = false;
};

struct GraphSites {
  Structure structure;
  std::optional<EmbeddingSite> embeddings;
  std::vector<LayerSites> layers;         // parallel to structure.layers
  std::vector<std::string> left_out;      // those of structure.near_misses that are attention, or hold layers
  bool result_is_sequence_first = false;  // the hidden states that forward returns are [S, B, H]
};

// Finds layers by data flow, from each attention outwards: its projections, the residual add and norm around it, and
// the feed-forward block behind or beside it. Names of modules play no part.
GraphSites find_sites(const CanonicalGraph& canonical, const torch::jit::Module& module);

// Finds weights that other linear maps apply, too: outside of attentions, in loops, in layers that were not recognised.
void mark_used_elsewhere(torch::jit::Graph& graph, const torch::jit::Module& module, GraphSites& found);

}  // namespace torchgraft
