#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <vector>

namespace torchgraft {

// While it lives, the graph returns what its result is packed of, each value by itself: a decoder gives its caches back
// as a tuple of lists, and alias analysis takes all that a container of containers holds for memory of the caller.
// Packing reads and writes no memory, so that what is proven of the graph without it holds for the graph.
class UnpackedResults {
 public:
  explicit UnpackedResults(const std::shared_ptr<torch::jit::Graph>& graph);
  ~UnpackedResults();
  UnpackedResults(const UnpackedResults&) = delete;
  UnpackedResults& operator=(const UnpackedResults&) = delete;

 private:
  // A tuple or list of `items`, or one of the values.
  struct Packing {
    torch::jit::NodeKind kind;
    c10::TypePtr type;
    torch::jit::SourceRange range;
    std::vector<Packing> items;
    bool is_value = false;
  };

  Packing describe(torch::jit::Value* value, std::vector<torch::jit::Value*>& values,
                   std::vector<torch::jit::Node*>& packers) const;
  torch::jit::Value* pack(const Packing& packing, size_t& next);

  std::shared_ptr<torch::jit::Graph> graph_;
  std::vector<Packing> results_;  // by output
};

}  // namespace torchgraft
