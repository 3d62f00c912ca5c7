#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>
#include <torchgraft/plan/structure.h>

#include <optional>

namespace torchgraft {

// How the keys or values `heads` of an attention hold those of earlier passes.
struct CacheSite {
  CacheKind kind = CacheKind::kNone;
  bool new_tokens_last = true;  // of kGrowing: this pass's tokens come behind those of the cache
};

// By data flow: what comes from forward's arguments, or lies in a tensor that this pass writes into, without any linear
// map in between is of earlier passes.
CacheSite find_cache(torch::jit::Value* heads, SymbolicShapes& shapes);

// A model may keep what it projects to keys and values. `tokens`, which the projections read, are those of `source`
// (kNone), perhaps behind tokens of earlier passes (kGrowing), or among them (kStatic). nullopt: they are others.
std::optional<CacheKind> cache_of_inputs(torch::jit::Value* tokens, torch::jit::Value* source, SymbolicShapes& shapes);

}  // namespace torchgraft
