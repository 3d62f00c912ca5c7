#include "support.h"

#include <torchgraft/patch/canonicalise/hoist_common_steps.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* body;  // of forward(x [2, 3, 6], past: Optional[Tensor]) -> Tensor
  size_t linears;    // left
};

class HoistCommonSteps : public ::testing::TestWithParam<Case> {};

TEST_P(HoistCommonSteps, ComputesTheSame) {
  at::manual_seed(0);
  const auto module =
      make_module({{"w", at::randn({6, 6})}, {"v", at::randn({6, 6})}},
                  std::string("def forward(self, x: Tensor, past: Optional[Tensor]) -> Tensor:") + GetParam().body);
  const auto graph = module.get_method("forward").graph()->copy();
  hoist_common_steps(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "aten::linear"), GetParam().linears);
  const at::Tensor x = at::randn({2, 3, 6});
  for (const c10::IValue& past : {c10::IValue(), c10::IValue(at::randn({2, 4, 6}))}) {
    const auto run = [&](const std::shared_ptr<torch::jit::Graph>& which) {
      at::manual_seed(1);
      return run_graph(module, which, {x.clone(), past}).toTensor();
    };
    EXPECT_TRUE(at::equal(run(graph), run(module.get_method("forward").graph()))) << "past " << !past.isNone();
  }
}

INSTANTIATE_TEST_SUITE_P(Common, HoistCommonSteps,
                         ::testing::Values(Case{"keys", R"python(
    if past is not None:
        k = torch.cat([past, torch.linear(torch.tanh(x), self.w).view(x.size(0), -1, 6)], 1)
    else:
        k = torch.linear(torch.tanh(x), self.w).view(x.size(0), -1, 6)
    return k
)python",
                                                1},
                                           Case{"other_order", R"python(
    if past is not None:
        k = torch.linear(x, self.w)
        v = torch.linear(x, self.v)
        y = torch.cat([past, k - v], 1)
    else:
        v = torch.linear(x, self.v)
        k = torch.linear(x, self.w)
        y = k - v
    return y
)python",
                                                2}),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(Different, HoistCommonSteps,
                         ::testing::Values(Case{"weights", R"python(
    if past is not None:
        y = torch.linear(x, self.w)
    else:
        y = torch.linear(x, self.v)
    return y
)python",
                                                2},
                                           Case{"after_a_write", R"python(
    if past is not None:
        x.mul_(2.0)
        y = torch.linear(x, self.w)
    else:
        y = torch.linear(x, self.w)
    return y
)python",
                                                2},
                                           Case{"random", R"python(
    if past is not None:
        y = torch.linear(torch.dropout(x, 0.5, True), self.w)
    else:
        y = torch.linear(torch.dropout(x, 0.5, True), self.w)
    return y
)python",
                                                2},
                                           Case{"refined", R"python(
    if past is not None:
        y = torch.linear(past, self.w)
    else:
        y = torch.linear(x, self.w)
    return y
)python",
                                                2}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
