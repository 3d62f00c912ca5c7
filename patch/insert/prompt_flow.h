#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/ir/ir.h>

#include <unordered_set>
#include <utility>
#include <vector>

namespace torchgraft {

// What must change in a graph whose embeddings get more tokens. All that is computed from the embeddings is right for
// any number of them. So only what else it reads is of interest: weights, masks and sizes of earlier values.
class PromptFlow {
 public:
  using Value = torch::jit::Value;
  using Node = torch::jit::Node;

  // An input of a node.
  using Read = std::pair<Node*, size_t>;

  // Throws c10::Error, on behalf of graft(), where something behind the embeddings reads values that know the number of
  // tokens without the prompt, and are neither the mask of an attention nor a size. Nodes before `begin`, which stands
  // behind the embeddings, are left out. `root` is the module of the graph.
  PromptFlow(torch::jit::Graph& graph, const GraphSites& sites, Node* begin, const torch::jit::Module& root);

  // The masks that attentions read, before they are computed on with values from behind the embeddings.
  const std::vector<Read>& masks() const { return masks_; }

  // Makes all that stands behind the embeddings read `tokens` for the number of tokens.
  void replace_sizes(Value* tokens);

 private:
  void collect(torch::jit::Block* block, Node* first);
  bool reads_flow(Node* node) const;
  void check(torch::jit::Block* block, Node* first);
  void check_attention(Node* attention);
  void find_masks(Node* attention);
  void check_read(Node* node, size_t input);
  bool is_fixed(Value* value) const;
  bool is_without_sizes(Value* value) const;
  bool holds_sizes(Value* value);
  Value* with_tokens(Value* value, Value* tokens);

  torch::jit::Graph& graph_;
  const EmbeddingSite& site_;
  SymbolicShapes shapes_;
  Dim batch_;
  Dim tokens_;
  std::unordered_set<const Value*> flow_;  // computed from the embeddings
  std::vector<Read> masks_;
  std::vector<Read> sizes_;
};

}  // namespace torchgraft
