#pragma once

#include <torchgraft/patch/insert/inserter.h>
#include <torchgraft/patch/insert/longer_tokens.h>

#include <vector>

namespace torchgraft {

// Puts the prompts of a slot among the embeddings, so that all that reads them reads more tokens. A row with a shorter
// prompt than others of its batch, or without one, ends with filler, which no attention shows and no gate counts.
class PromptInserter {
 public:
  // Before all other ops: gates read own_tokens().
  PromptInserter(Inserter& inserter, const EmbeddingSite& site, const Slot& slot, const torch::jit::Module& module);

  // The tokens [B, S] that are a row's own, bool, or None where all are; null where rows must be equally long.
  torch::jit::Value* own_tokens() const { return longer_.own; }

  // Last, so that all ops read what it changes. Throws c10::Error where the graph cannot take more tokens.
  void finish();

 private:
  torch::jit::Value* call(const char* function, const std::vector<torch::jit::Value*>& arguments);

  Inserter& inserter_;
  torch::jit::Graph& graph_;
  const EmbeddingSite& site_;
  const Slot& slot_;
  const torch::jit::Module& module_;
  LongerTokens longer_;
};

}  // namespace torchgraft
