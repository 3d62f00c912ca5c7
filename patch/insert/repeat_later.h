#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace torchgraft {

// Whether the result of `node` tells sizes, a dtype or a device of its operands, and none of their numbers.
bool tells_no_numbers(const torch::jit::Node* node);

// The place before the first adapter of a graph, where rows of a Parallel can be repeated later than at the graph's
// top: what stands before it is then computed once for all children.
//
// What crosses the place has to be repeated, or must not be. The graph does not tell which: a size of 4 may be the
// batch's or the heads'. So a run of what stands before the place answers: rows that were repeated before it must give
// what the same rows give that are repeated behind it. Each value that crosses it is then one of Kind, or the place
// will not do. A module that runs on other kinds of inputs than the run saw repeats rows at the top (same_kind).
// A graph that writes in place, or that branches by what its inputs are before the place, repeats rows at the top.
class LatePlace {
 public:
  using Graph = torch::jit::Graph;
  using Node = torch::jit::Node;
  using Value = torch::jit::Value;

  // Of a graph whose last input is adapter_ids, before anything is inserted for a Parallel.
  explicit LatePlace(Graph& graph);

  // Runs what stands before the place with `arguments` of forward, adapter_ids left out, of `rows` rows, the first of
  // which then gets `id`, a composition that makes `channels` rows of it. `at_top`: what stands for the graph's inputs
  // since. Returns whether the place will do.
  bool try_with(const torch::jit::Module& root, const std::vector<c10::IValue>& arguments, int64_t rows, int64_t id,
                int64_t channels, const std::vector<std::pair<Value*, Value*>>& at_top);

  // Repeats rows at the place: `index` is that of repeated_index, or None.
  void insert(Value* index, Value* rows);

 private:
  enum class Kind {
    kFree,   // the same for any number of rows
    kRows,   // dimension `dim` has a size for each row
    kCount,  // a number, or a tensor of one, that is a multiple of the number of rows
    kNone,
  };
  struct Live {
    Value* value = nullptr;
    bool is_of_numbers = false;  // not of the inputs' sizes alone
    Kind kind = Kind::kFree;
    int64_t rank = 0;
    int64_t dim = 0;
  };

  void find();
  bool tell(Live& live, const c10::IValue& once, const c10::IValue& repeated, const at::Tensor& index) const;
  std::vector<c10::IValue> run(const torch::jit::Module& root, std::vector<c10::IValue> arguments,
                               const at::Tensor& ids) const;

  Graph& graph_;
  Node* place_ = nullptr;
  std::vector<Live> live_;
};

}  // namespace torchgraft
