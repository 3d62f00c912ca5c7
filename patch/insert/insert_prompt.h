#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Puts the prompts of a slot among the embeddings, so that all that reads them reads more tokens. The rows of a batch
// must have prompts of one length. Last, so that all ops read what it changes. Throws c10::Error where the graph cannot
// take more tokens.
void insert_prompt(Inserter& inserter, const EmbeddingSite& site, const Slot& slot, const torch::jit::Module& module);

}  // namespace torchgraft
