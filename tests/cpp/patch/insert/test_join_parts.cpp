#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/join_parts.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using testing::count_kind;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// A packed projection p [2, 3, 12], whose columns are changed by one LoRA after the other.
class Packed {
 public:
  Packed() {
    for (const char* name : {"x", "p", "a", "b", "s"}) {
      inputs_[name] = graph->addInput(name);
    }
    whole = inputs_.at("p");
  }

  Value* input(const char* name) const { return inputs_.at(name); }

  // Changes columns [begin, begin + 4).
  void add_lora(int64_t begin) {
    Value* base = graph->insert(c10::aten::narrow, {whole, -1, begin, 4});
    Value* pair = graph->insert(c10::Symbol::fromQualString("torchgraft::gated_lora"),
                                {input("x"), base, input("a"), input("b"), input("s")});
    Value* lora = pair->node()->input(0);  // Graph::insert packs several results into a tuple
    pair->node()->destroy();
    write(base, lora, begin);
  }

  void write(Value* base, Value* changed, int64_t begin) {
    whole = graph->insert(c10::aten::slice_scatter, {whole, changed, -1, begin, begin + 4, 1});
    parts.reads.push_back(base->node());
    parts.writes.push_back(whole->node());
  }

  // Makes the graph return `result`, and says whether the writes were joined; the numbers stay as they were.
  bool joins(Value* result, int64_t columns = 12) {
    graph->registerOutput(result);
    at::manual_seed(0);
    const std::vector<at::Tensor> tensors = {at::randn({2, 3, 5}), at::randn({2, 3, 12}), at::randn({1, 2, 5}),
                                             at::randn({1, 4, 2}), at::ones({1})};
    const auto run = [&] {
      torch::jit::GraphExecutor executor(graph->copy(), "forward");
      torch::jit::Stack stack(tensors.begin(), tensors.end());
      executor.run(stack);
      return stack.back().toTensor();
    };
    const at::Tensor before = run();
    parts.columns = columns;
    join_parts(*graph, parts);
    graph->lint();
    EXPECT_TRUE(at::equal(run(), before));
    const bool is_joined = count_kind(*graph, "aten::slice_scatter") == 0;
    EXPECT_EQ(count_kind(*graph, "aten::cat"), is_joined ? 1u : 0u);
    return is_joined;
  }

  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  PackedParts parts;
  Value* whole;

 private:
  std::map<std::string, Value*> inputs_;
};

TEST(JoinParts, CopiesAProjectionOnceForAllLoras) {
  for (const std::vector<int64_t>& begins : {std::vector<int64_t>{0, 8}, {8, 4}, {0, 4, 8}, {4}}) {
    Packed packed;
    for (const int64_t begin : begins) {
      packed.add_lora(begin);
    }
    EXPECT_TRUE(packed.joins(packed.whole)) << begins;
  }
}

TEST(JoinParts, LetsOthersReadTheProjectionItself) {
  Packed packed;
  packed.add_lora(0);
  packed.add_lora(8);
  EXPECT_TRUE(packed.joins(packed.graph->insert(c10::aten::mul, {packed.whole, packed.input("p")})));
}

TEST(JoinParts, LeavesAResultThatIsReadBetweenTwoChanges) {
  Packed packed;
  packed.add_lora(0);
  Value* between = packed.whole;
  packed.add_lora(8);
  EXPECT_FALSE(packed.joins(packed.graph->insert(c10::aten::add, {packed.whole, between})));
}

TEST(JoinParts, LeavesChangesThatOverlap) {
  Packed packed;
  packed.add_lora(0);
  packed.add_lora(2);
  EXPECT_FALSE(packed.joins(packed.whole));
}

TEST(JoinParts, LeavesChangesThatMayHaveAnotherDtype) {
  Packed packed;
  Value* base = packed.graph->insert(c10::aten::narrow, {packed.whole, -1, 0, 4});
  packed.write(base, packed.graph->insert(c10::aten::mul, {base, base}), 0);
  EXPECT_FALSE(packed.joins(packed.whole));
}

TEST(JoinParts, LeavesAProjectionOfUnknownWidth) {
  Packed packed;
  packed.add_lora(0);
  EXPECT_FALSE(packed.joins(packed.whole, /*columns=*/0));
}

}  // namespace
}  // namespace torchgraft
