#pragma once

#include <torchgraft/patch/sites/find_sites.h>

#include <map>
#include <set>
#include <string>
#include <vector>

namespace torchgraft {

// The note on a layer that has an attention and no feed-forward block.
inline const std::string kNoFeedForward =
    "no feed-forward block (linear, activation, linear, residual add) follows its attention";

// Finds what belongs to one attention. One member function per structure, one file per group of them:
// find_attention.cpp, find_residual.cpp, find_feed_forward.cpp.
class SiteFinder {
 public:
  SiteFinder(const CanonicalGraph& canonical, const torch::jit::Module& module);

  // Fills both from `attention`; false, with the reason in words, when it cannot be adapted at all.
  bool find_layer(torch::jit::Node* attention, Layer& layer, LayerSites& sites, std::string& reason);

  // Overrules what was found for `layer` by an edited entry.
  void apply(const Layer& wanted, Layer& layer, LayerSites& sites);

  // The module path of the weight of a linear map; empty when it has none (a frozen graph's constants).
  std::string path_of(const torch::jit::Node* linear) const;

  // Whether the first tensor of what the graph returns is [S, B, H].
  bool result_is_sequence_first();

 private:
  struct FeedForward {
    std::vector<torch::jit::Node*> in;
    LinearSite out;
    ResidualSite residual;
  };

  bool find_attention(torch::jit::Node* attention, Layer& layer, LayerSites& sites, std::string& reason);
  bool find_projection(torch::jit::Value* heads, const char* role, std::optional<Projection>& projection,
                       LinearSite& site, Layer& layer, std::string& reason);
  bool find_elsewhere(const torch::jit::Node* linear, LinearSite& site);
  bool find_columns(torch::jit::Value* heads, Projection& projection, LinearSite& site, Layer& layer,
                    std::string& reason);
  void find_attention_residual(Layer& layer, LayerSites& sites);
  void find_feed_forward(Layer& layer, LayerSites& sites);
  std::vector<FeedForward> feed_forwards(const std::vector<torch::jit::Value*>& streams, const LayerSites& sites);

  std::optional<ResidualSite> find_residual(torch::jit::Value* branch, torch::jit::Value* block_input);
  std::optional<LinearSite> linear_behind(torch::jit::Value* value, bool through_any_op);
  std::vector<torch::jit::Node*> linears_reading(const std::vector<torch::jit::Value*>& streams);
  bool is_scale(const torch::jit::Node* node, const torch::jit::Value* scaled);
  bool is_top_level(const torch::jit::Node* node) const { return node->owningBlock() == graph_.block(); }

  torch::jit::Node* linear_at(const std::string& path, const std::string& what);
  LinearSite site_at(const Projection& wanted, const std::string& what);
  void apply_residual(const Layer& wanted, const char* field, bool has_one, NormOrder order, const LinearSite* behind,
                      const LinearSite& in, std::optional<ResidualSite>& site);

  Projection describe(const torch::jit::Node* linear);
  // Whether `tokens`, of rank 3, has the batch first or second; false when it is neither.
  bool layout_of(torch::jit::Value* tokens, bool& sequence_first);

  torch::jit::Graph& graph_;
  const torch::jit::Module& module_;
  SymbolicShapes shapes_;
  Dim batch_;
  std::set<torch::jit::Node*> attention_projections_;  // the linear maps behind any attention's q, k and v
  std::map<const void*, std::vector<torch::jit::Node*>> linears_elsewhere_;  // all others, by the data of their weights
};

bool is_norm(const torch::jit::Node* node);

// The values that a block reading `input` may take for the residual stream: `input` itself, and what it is the norm of.
std::vector<torch::jit::Value*> streams_of(torch::jit::Value* input);

// The norm order of a block that reads `input` and adds to `residual`; kPost still needs a norm after the add.
NormOrder norm_order(torch::jit::Value* input, torch::jit::Value* residual);

// The norm that alone reads `sum`, as after a post-norm block; null when there is none or others read it too.
torch::jit::Node* norm_after(torch::jit::Value* sum);

}  // namespace torchgraft
