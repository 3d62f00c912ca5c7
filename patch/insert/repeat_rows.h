#pragma once

#include <torchgraft/patch/adapters/compositions.h>
#include <torchgraft/patch/sites/find_sites.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <map>
#include <set>
#include <vector>

namespace torchgraft {

// Repeats the rows of a batch for compositions with a Parallel, as kParallelRows says: the graph computes a row for
// each channel from there on, and returns so many. Adapters see ids of these rows, and know of nothing else.
class RowRepeater {
 public:
  // Call it while `graph` is that of the base. Throws c10::Error where forward's arguments may have rows that cannot be
  // repeated.
  RowRepeater(torch::jit::Graph& graph, const GraphSites& sites, const torch::jit::Module& root);

  // Call it when all adapters are inserted; the last input is adapter_ids. `first_id`: of the first of `compositions`.
  // Rows are repeated at the top or, for inputs of the kind of one of `examples` (arguments of forward), before the
  // first adapter, where a run with this example shows that it comes to the same (LatePlace).
  void operator()(const std::vector<NamedComposition>& compositions, int64_t first_id,
                  const std::vector<std::vector<c10::IValue>>& examples);

 private:
  using Value = torch::jit::Value;

  void find_batch(const GraphSites& sites, const torch::jit::Module& root);
  Value* repeated(Value* input, Value* index, Value* rows, const std::vector<std::vector<c10::IValue>>& examples);
  bool has_no_rows(const Value* input, const std::vector<std::vector<c10::IValue>>& examples) const;
  int64_t rows_in(const std::vector<c10::IValue>& arguments) const;
  // Whether forward gets arguments of the kind of `example`; null where that cannot be told.
  Value* is_like(const std::vector<c10::IValue>& example, Value* rows);
  Value* is_like(Value* input, const c10::IValue& example, int64_t example_rows, Value* rows);

  torch::jit::Graph& graph_;
  const torch::jit::Module& root_;
  std::map<const Value*, int64_t> known_;  // arguments one dimension of which is known to be the batch, and which
  std::map<const Value*, int64_t> heads_of_masks_;  // arguments that may be [B * heads, S, S]
  Value* counted_ = nullptr;                        // the argument that tells how many rows there are
  std::set<Value*> sources_;                        // the others that what the layers read is made of
  bool sequence_first_ = false;
};

}  // namespace torchgraft
