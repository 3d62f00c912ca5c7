#pragma once

#include <torchgraft/patch/insert/composer.h>

namespace torchgraft {

// Compositions at an attention: PrefixTuningLayer of the adapters library. A Stack puts the prefixes of its parts one
// before the other.
class PrefixComposer : public Composer {
 public:
  using Composer::Composer;

  // The prefixes [rows or 1, heads, length, head_dim] of the composition: keys and values. x: [rows, S, H].
  std::pair<Value*, Value*> operator()(const Composition& tree, Value* x);

 protected:
  ComposedState single(const ComposedPart& part, ComposedState state) override;
  ComposedState joined_rows(BlockKind block, const std::vector<ComposedState>& states) override;

 private:
  void check_behind_split(const ComposedState& state, bool has_gate) const;
};

}  // namespace torchgraft
