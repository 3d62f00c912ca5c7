#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <initializer_list>
#include <optional>

namespace torchgraft {

// Whether `value` holds elements of forward's arguments, moved about only: keys and values for which this holds are of
// earlier passes.
bool is_cached(torch::jit::Value* value);

// Whether something may write into one of `values`, of earlier passes, or into what it was copied from: it may hold
// elements of this pass, too.
bool caches_are_written(std::initializer_list<torch::jit::Value*> values);

// Takes keys or values of unknown shape that are all of earlier passes to have the shape that queries [B, heads, S,
// head size] ask for.
void assume_heads(torch::jit::Value* heads, const std::optional<Shape>& query, bool is_transposed,
                  SymbolicShapes& shapes);

}  // namespace torchgraft
