#pragma once

#include <torchgraft/patch/insert/composer.h>
#include <torchgraft/patch/insert/fold_fusion.h>
#include <torchgraft/patch/insert/insert_bottleneck.h>

namespace torchgraft {

// Compositions at a residual add: BottleneckLayer of the adapters library.
class BottleneckComposer : public Composer {
 public:
  // `state` is that of the site, whose normed sum exists already where a part reads it. `normed_sum`: its rows, or
  // null.
  BottleneckComposer(Inserter& inserter, const ComposedSite& site, BottleneckInserter& bottlenecks,
                     ResidualState& state, Value* normed_sum)
      : Composer(inserter, site), bottlenecks_(bottlenecks), state_(state), normed_sum_(normed_sum) {}

  // The branch behind the composition. branch, residual: [rows, S, H].
  Value* operator()(const Composition& tree, Value* branch, Value* residual);

 protected:
  ComposedState single(const ComposedPart& part, ComposedState state) override;
  ComposedState pre_block(const Composition& block, ComposedState state) override;
  ComposedState joined_rows(BlockKind block, const std::vector<ComposedState>& states) override;
  ComposedState mean(const std::vector<ComposedState>& states, const std::vector<double>& shares) override;
  ComposedState split(const Composition& block, ComposedState state) override;
  ComposedState fuse(const Composition& block, ComposedState state) override;

 private:
  // Adapter.pre_forward of `part`.
  ComposedState pre_forward(const ComposedPart& part, ComposedState state);
  void add_unused_gate(const ComposedPart& part, const ComposedState& state);
  // bottleneck_up of a child of a Fuse: what an adapter adds, without gate and residual.
  Value* up(const ComposedPart& part, const ComposedState& state);
  Value* up_of_child(const Composition& child, ComposedState state);
  // What bottleneck_up and the layer are together, where the children are adapters and can be folded.
  std::optional<FoldedFusion> fold(const AdapterFusion& fusion, const Composition& block, const Slot& slot);
  // BertFusion.forward without the residual, of folded adapters.
  Value* folded(const FoldedFusion& fusion, Value* hidden, Value* query);
  // BertFusion.forward without the residual.
  Value* fused(const AdapterFusion& fusion, Value* query, const std::vector<Value*>& ups);

  BottleneckInserter& bottlenecks_;
  ResidualState& state_;
  Value* normed_sum_;
};

// Throws c10::Error, which begins with `compose: '<name>'`, where parts at one site cannot be composed: they take
// different values for the branch (BottleneckWiring), or replace the norm behind it.
void check_composed_bottlenecks(const ComposedSite& site);

// Whether a part reads the normalised sum of branch and residual.
bool reads_normed_sum(const ComposedSite& site);

}  // namespace torchgraft
