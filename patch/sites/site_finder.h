#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// Answers what find_attention, find_residual, find_feed_forward and apply_sites all ask of one canonical graph. Keeps
// the shapes worked out so far, and the batch size and the block of the present attention.
class SiteFinder {
 public:
  SiteFinder(const CanonicalGraph& canonical, const torch::jit::Module& module);

  SymbolicShapes& shapes() { return shapes_; }
  const torch::jit::Module& module() const { return module_; }
  // The batch size in the present attention. Set it before layout_of is called.
  Dim& batch() { return batch_; }
  // The block that the present attention stands in: the graph's own, or that of a branch. All of a layer stands there.
  torch::jit::Block*& home() { return home_; }
  bool is_at_home(const torch::jit::Node* node) const { return node->owningBlock() == home_; }
  // The linear maps behind any attention's queries, keys and values.
  const std::set<torch::jit::Node*>& attention_projections() const { return attention_projections_; }
  // Counts a linear map among them, of an attention that was not recognised.
  void add_attention_projection(torch::jit::Node* linear) { attention_projections_.insert(linear); }
  // All other linear maps, by the identity of their weights.
  const std::map<const void*, std::vector<torch::jit::Node*>>& linears_elsewhere() const { return linears_elsewhere_; }

  // Whether `node` stands in no branch and no loop.
  bool is_top_level(const torch::jit::Node* node) const { return node->owningBlock() == graph_.block(); }

  // The module path of the weight of a linear map; empty when it has none (a frozen graph's constants).
  std::string path_of(const torch::jit::Node* linear) const;

  // The linear map with this path. Throws c10::Error, on behalf of `what`, when there is none, or several.
  torch::jit::Node* linear_at(const std::string& path, const std::string& what);

  // Sizes, path and columns of a linear map; out_features is 0 when its weight is computed at run time.
  Projection describe(const torch::jit::Node* linear);

  // Sets sequence_first to whether `tokens`, of rank 3, has the batch second; false when it has it neither first nor
  // second, or is_square().
  bool layout_of(torch::jit::Value* tokens, bool& sequence_first);

  // Whether `tokens` has as many tokens as rows, so that the two cannot be told apart.
  bool is_square(torch::jit::Value* tokens);

  // Whether the first tensor of the graph's result is [S, B, H].
  bool result_is_sequence_first();

  // The one linear map that `value` flows into: through rearrangements and norms only, or through any element-wise op.
  std::optional<LinearSite> linear_behind(torch::jit::Value* value, bool through_any_op);

  // Whether `node` multiplies `scaled` by something that does not depend on the input: layer scale, a residual
  // multiplier.
  bool is_scale(const torch::jit::Node* node, const torch::jit::Value* scaled);

 private:
  torch::jit::Graph& graph_;
  const torch::jit::Module& module_;
  SymbolicShapes shapes_;
  Dim batch_;
  torch::jit::Block* home_;
  std::set<torch::jit::Node*> attention_projections_;
  std::map<const void*, std::vector<torch::jit::Node*>> linears_elsewhere_;
};

bool is_norm(const torch::jit::Node* node);

}  // namespace torchgraft
