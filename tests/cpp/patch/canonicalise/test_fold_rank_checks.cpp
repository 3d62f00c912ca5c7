#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/fold_rank_checks.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// The questions of torch.nn.MultiheadAttention in short. `message` is its error for other ranks.
torch::jit::Module module_with(const std::string& message) {
  return make_module({{"w", at::eye(4)}}, R"python(
def forward(self, x: Tensor, memory: Tensor) -> Tensor:
    query, key = x, memory
    if x.dim() == 3:
        query = x.transpose(0, 1)
        key = memory.transpose(0, 1)
    if query.dim() == 3:
        is_batched = True
    elif query.dim() == 2:
        is_batched = False
    else:
        is_batched = False
        assert False, ")python" + message + R"python( but received"
    if not is_batched:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    if query is key:
        scores = torch.linear(query, self.w) * 2
    else:
        scores = torch.linear(query, self.w) + torch.linear(key, self.w)
    return scores.transpose(0, 1) if is_batched else scores.squeeze(1)
)python");
}

constexpr const char* kMessage = "query should be unbatched 2D or batched 3D tensor";

TEST(FoldRankChecks, BatchedInputComputesTheSameAndRank2IsRefused) {
  const auto module = module_with(kMessage);
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  fold_rank_checks(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "prim::If"), 1u) << *graph;  // that of the assertion
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 2u);
  const at::Tensor x = at::randn({2, 3, 4}), memory = at::randn({2, 3, 4});
  EXPECT_EQ(largest_difference(run_graph(module, graph, {x, memory}).toTensor(),
                               torch::jit::Module(module).forward({x, memory}).toTensor()),
            0.0);
  try {
    run_graph(module, graph, {x[0], memory[0]});
    FAIL() << "rank 2 was accepted";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("batched input"), std::string::npos) << error.what();
  }
}

TEST(FoldRankChecks, OtherCodeThatAsksForARankStays) {
  const auto module = module_with("expected two or three dimensions");
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  const size_t branches = count_kind(*graph, "prim::If");
  fold_rank_checks(graph);
  EXPECT_EQ(count_kind(*graph, "prim::If"), branches);
}

}  // namespace
}  // namespace torchgraft
