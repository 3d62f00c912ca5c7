#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_softmax.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::make_module;
using testing::run_graph;

// x [2, 3, 4, 5]; `body` makes `out`.
struct Case {
  const char* name;
  const char* body;
  bool is_softmax;
};

class RaiseSoftmax : public ::testing::TestWithParam<Case> {};

TEST_P(RaiseSoftmax, GivesOneSoftmaxOrLeavesTheGraphAlone) {
  const Case& test = GetParam();
  const auto module =
      make_module({}, "def forward(self, x: Tensor) -> Tensor:\n" + std::string(test.body) + "    return out\n");
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  at::manual_seed(0);
  const at::Tensor x = at::randn({2, 3, 4, 5});
  const at::Tensor expected = run_graph(module, graph, {x.clone()}).toTensor();
  const size_t before = count_kind(*graph, "aten::softmax");
  raise_softmax(graph);
  graph->lint();
  EXPECT_LT((run_graph(module, graph, {x.clone()}).toTensor() - expected).abs().max().item<float>(), 1e-6);
  EXPECT_EQ(count_kind(*graph, "aten::softmax"), test.is_softmax ? 1 : before) << graph->toString();
  EXPECT_EQ(count_kind(*graph, "aten::amax") + count_kind(*graph, "aten::exp") + count_kind(*graph, "aten::max") == 0,
            test.is_softmax);
}

INSTANTIATE_TEST_SUITE_P(
    Spellings, RaiseSoftmax,
    ::testing::Values(
        Case{"exp_of_log_softmax", "    out = torch.log_softmax(x, -1).exp()\n", true},
        Case{"exp_and_sum", "    e = x.exp()\n    out = e / e.sum([-1], True)\n", true},
        Case{"stable", "    e = (x - x.amax([-1], True)).exp()\n    out = e / e.sum([-1], True)\n", true},
        Case{"values_of_max", "    e = (x - x.detach().max(-1, True)[0]).exp()\n    out = e / e.sum([-1], True)\n",
             true},
        Case{"shifted_softmax", "    out = torch.softmax(x - x.amax([-1], True), -1)\n", true},
        Case{"shift_over_another_dimension", "    out = torch.softmax(x - x.amax([-2], True), -1)\n", false},
        Case{"shift_by_another_tensor", "    out = torch.softmax(x - (2 * x).amax([-1], True), -1)\n", false},
        Case{"sum_of_others", "    e = x.exp()\n    out = e / (e + 1).sum([-1], True)\n", false},
        Case{"sum_over_two_dimensions", "    e = x.exp()\n    out = e / e.sum([-2, -1], True)\n", false},
        Case{"written_between", "    e = x.exp()\n    s = e.sum([-1], True)\n    e.mul_(2)\n    out = e / s\n", false},
        Case{"subtracts_twice", "    out = torch.softmax(torch.sub(x, x.amax([-1], True), alpha=2), -1)\n", false}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
