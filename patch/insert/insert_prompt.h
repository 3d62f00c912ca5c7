#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Puts each row's prompt before its embeddings, and lets the masks and sizes behind them follow.
//
// Rows with a shorter prompt than others of their batch, or without one, get as many more tokens at their end, which no
// other token sees. All rows of one prompt are what the adapters library makes of them.
class PromptInserter {
 public:
  // Changes masks and sizes. Must come before whatever reads masks. Throws c10::Error where the graph cannot take
  // prompts. What the embeddings flow into reads them without a prompt still.
  PromptInserter(Inserter& inserter, const GraphSites& sites, const Slot& slot, const torch::jit::Module& root);

  // The tokens [B, S] of the rows themselves, bool: no gate may be a mean over others.
  torch::jit::Value* own_tokens() const { return own_tokens_; }

  // Makes all that reads the embeddings read those with prompts.
  void finish();

 private:
  torch::jit::Value* call(const char* function, std::vector<torch::jit::Value*> arguments);
  void replace_mask(torch::jit::Node* node, size_t input);

  Inserter& inserter_;
  torch::jit::Graph& graph_;
  const EmbeddingSite& site_;
  torch::jit::Node* end_;  // stands behind what was inserted at the embeddings
  torch::jit::Value* lengths_ = nullptr;
  torch::jit::Value* rows_ = nullptr;  // the embeddings [B, S, E]
  torch::jit::Value* result_ = nullptr;
  torch::jit::Value* own_tokens_ = nullptr;
  std::map<const torch::jit::Value*, torch::jit::Value*> masks_;
};

}  // namespace torchgraft
