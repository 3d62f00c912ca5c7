#pragma once

#include <torchgraft/patch/insert/composer.h>

namespace torchgraft {

// Compositions at a linear map: LoRALinear of the adapters library. In a Stack the second LoRA reads what the first
// has made, not the layer's input.
class LoraComposer : public Composer {
 public:
  using Composer::Composer;

  // The map's result with the composition. x: [rows, S, in], base: [rows, S, out].
  Value* operator()(const Composition& tree, Value* x, Value* base);

 protected:
  ComposedState single(const ComposedPart& part, ComposedState state) override;
  ComposedState mean(const std::vector<ComposedState>& states, const std::vector<double>& shares) override;
  ComposedState joined_rows(BlockKind block, const std::vector<ComposedState>& states) override;

 private:
  void check_are_alike(const std::vector<ComposedState>& states, const char* block) const;
  Value* of_rows(Value* vector, Value* x);
};

// Throws c10::Error, which begins with `compose: '<name>'`, for parts that no composition can have at this site.
void check_composed_loras(const ComposedSite& site, const LinearSite& linear);

}  // namespace torchgraft
