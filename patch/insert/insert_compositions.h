#pragma once

#include <torchgraft/patch/insert/composer.h>
#include <torchgraft/patch/insert/insert_bottleneck.h>
#include <torchgraft/patch/insert/insert_lora.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// Adds compositions behind the ops of plain adapters, for which their rows are rows of the base. At every site where an
// adapter of a composition has something, the graph takes the composition's rows if there are any, evaluates the
// composition on them, and puts them back. Each adapter in it is called as it is alone, so that any nesting is exact.
class CompositionInserter {
 public:
  // `attentions`: the present result of each layer's attention, by position in the sites' layers.
  CompositionInserter(Inserter& inserter, const std::vector<Adapter>& adapters, LoraInserter& loras,
                      BottleneckInserter& bottlenecks, std::map<size_t, torch::jit::Value*>& attentions)
      : inserter_(inserter),
        graph_(inserter.graph()),
        adapters_(adapters),
        loras_(loras),
        bottlenecks_(bottlenecks),
        attentions_(attentions) {}

  // Inserts all compositions of the inserter. Throws c10::Error for one that cannot be inserted.
  void operator()(const std::vector<Slot>& slots, const std::vector<SlotRun>& runs);

  // The gates that were inserted, and what they are of.
  const std::vector<torch::jit::Value*>& gates() const { return gates_; }
  const std::vector<ComposedGate>& described_gates() const { return described_gates_; }

 private:
  using Graph = torch::jit::Graph;
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  // The rows of one composition: 0 none, 1 all, 2 those in `rows`.
  struct Rows {
    Value* uses = nullptr;
    Value* rows = nullptr;
    Value* has_any = nullptr;
    std::vector<Value*> parts = {};  // of a pool: the rows that its adapters stand for, in the order of adapters_in
    size_t first_key = 0;            // its first position in composed_keys
  };
  // A result, and the gates that it was computed with.
  struct Evaluated {
    Value* result = nullptr;
    std::vector<Composer::Gate> gates;
  };

  Rows rows_of(size_t composition);
  // Makes the graph throw where a row, or all, use a composition with a MultiTask: each row needs the id of its task.
  void refuse_rows_of(size_t composition);
  ComposedSite site_of(const NamedComposition& composition, const Rows& rows, size_t layer, const std::string& site,
                       const std::vector<const Slot*>& slots) const;
  void check_site(const ComposedSite& site) const;

  // The rows of `value` [B, ...] that are the composition's.
  Value* taken(Value* value, const Rows& rows);
  // `whole` with the rows that `evaluate` computes, where there are any.
  Value* at_rows(Value* whole, const Rows& rows, const ComposedSite& site, const std::function<Evaluated()>& evaluate);

  void insert(const NamedComposition& composition, const Rows& rows, const ComposedSite& site);
  void insert_lora(const NamedComposition& composition, const Rows& rows, const ComposedSite& site,
                   const LinearSite& linear);
  void insert_bottleneck(const NamedComposition& composition, const Rows& rows, const ComposedSite& site,
                         const ResidualSite& residual);
  void insert_prefix(const NamedComposition& composition, const Rows& rows, const ComposedSite& site);
  Value* prefix_attention(const std::pair<Value*, Value*>& prefix, Value* x, const Rows& rows);

  Inserter& inserter_;
  Graph& graph_;
  const std::vector<Adapter>& adapters_;
  LoraInserter& loras_;
  BottleneckInserter& bottlenecks_;
  std::map<size_t, Value*>& attentions_;
  std::vector<Value*> gates_;
  std::vector<ComposedGate> described_gates_;
};

}  // namespace torchgraft
