#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/hoist_score_product.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* with_mask;
  const char* without_mask;
  size_t products;  // bmm and baddbmm that are left in the graph
};

class HoistScoreProduct : public ::testing::TestWithParam<Case> {};

TEST_P(HoistScoreProduct, ComputesTheSame) {
  auto module =
      make_module({}, std::string("def forward(self, q: Tensor, k: Tensor, mask: Optional[Tensor]) -> Tensor:\n"
                                  "    if mask is not None:\n        scores = ") +
                          GetParam().with_mask + "\n    else:\n        scores = " + GetParam().without_mask +
                          "\n    return torch.softmax(scores, dim=-1)\n");
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  hoist_score_product(graph);
  simplify(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "aten::bmm") + count_kind(*graph, "aten::baddbmm"), GetParam().products);
  at::manual_seed(0);
  const at::Tensor q = at::randn({4, 5, 3}), k = at::randn({4, 5, 3}), mask = at::randn({4, 5, 5});
  for (const c10::IValue& given : {c10::IValue(), c10::IValue(mask)}) {
    const at::Tensor expected = module.forward({q, k, given}).toTensor();
    EXPECT_LT(largest_difference(run_graph(module, graph, {q, k, given}).toTensor(), expected), 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Branches, HoistScoreProduct,
    ::testing::Values(
        Case{"one_product", "torch.baddbmm(mask, q, k.transpose(-2, -1))", "torch.bmm(q, k.transpose(-2, -1))", 1},
        Case{"scaled_bias", "torch.baddbmm(mask, q, k.transpose(-2, -1), beta=2.0)",
             "torch.bmm(q, k.transpose(-2, -1))", 2},
        Case{"other_queries", "torch.baddbmm(mask, q, k.transpose(-2, -1))", "torch.bmm(k, k.transpose(-2, -1))", 2},
        Case{"other_keys", "torch.baddbmm(mask, q, k.transpose(-2, -1))", "torch.bmm(q, q.transpose(-2, -1))", 2},
        Case{"other_transpose", "torch.baddbmm(mask, q, k.transpose(-2, -1))", "torch.bmm(q, k.transpose(1, 2))", 2}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
