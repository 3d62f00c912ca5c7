#include "support.h"

#include <torchgraft/patch/canonicalise/collect_appends.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* body;  // of forward(x, other: List[Tensor]) -> List[Tensor]
  size_t appends;    // left
};

class CollectAppends : public ::testing::TestWithParam<Case> {};

TEST_P(CollectAppends, GivesTheSameList) {
  const auto module = make_module(
      {}, std::string("def forward(self, x: Tensor, other: List[Tensor]) -> List[Tensor]:") + GetParam().body);
  const auto graph = module.get_method("forward").graph()->copy();
  collect_appends(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "aten::append"), GetParam().appends);
  const at::Tensor x = at::randn({2, 3});
  const auto run = [&](const std::shared_ptr<torch::jit::Graph>& run) {
    return run_graph(module, run, {x.clone(), c10::List<at::Tensor>({x + 1})}).toTensorVector();
  };
  const auto expected = run(module.get_method("forward").graph());
  const auto found = run(graph);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Lists, CollectAppends,
                         ::testing::Values(Case{"written_elements", R"python(
    result: List[Tensor] = []
    y = x.clone()
    y[:, 0] = 3.0
    result.append(y)
    z = x * 2.0
    z[:, 1] = 4.0
    result.append(z)
    return result
)python",
                                                0},
                                           Case{"read_between", R"python(
    result = [x]
    count = len(result)
    result.append(x * count)
    return result
)python",
                                                1},
                                           Case{"read_in_a_branch_between", R"python(
    result = [x]
    y = x
    if x.dim() == 2:
        y = result[0] * 2.0
    result.append(y)
    return result
)python",
                                                1},
                                           Case{"append_in_a_branch", R"python(
    result = [x]
    if x.dim() == 2:
        result.append(x + 1.0)
    return result
)python",
                                                1},
                                           Case{"list_of_the_caller", R"python(
    other.append(x)
    return other
)python",
                                                1},
                                           Case{"two_names", R"python(
    result = [x]
    both = [result, other]
    result.append(x * 2.0)
    both[0].append(x * 3.0)
    return result
)python",
                                                2}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
