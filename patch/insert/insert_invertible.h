#pragma once

#include <torchgraft/patch/insert/inserter.h>

namespace torchgraft {

// Changes the embeddings by the invertible adapters of `slot`, and what the output embeddings read by their inverse.
// Call it when all other ops are inserted: what reads the embeddings reads the changed ones then. Returns a gate of 1.
torch::jit::Value* insert_invertible(Inserter& inserter, const EmbeddingSite& site, const Slot& slot);

}  // namespace torchgraft
