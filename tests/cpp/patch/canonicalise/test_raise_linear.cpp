#include "linear_support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_linear.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/freeze_module.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::expect_same_results;
using testing::largest_difference;
using testing::make_module;
using testing::only_linear;
using testing::run_graph;

// Linear maps of x [2, 5, 6] by `w` [6, 4] or `v` [4, 6], with or without `b` [4]; `body` makes `out`.
struct Case {
  const char* name;
  const char* body;
  const char* others;  // kinds other than aten::linear that must be left
};

torch::jit::Module module_of(const Case& test) {
  at::manual_seed(0);
  const auto parameter = [](at::IntArrayRef sizes) { return at::randn(sizes).requires_grad_(); };
  return make_module(
      {{"w", parameter({6, 4})}, {"v", parameter({4, 6})}, {"b", parameter({4})}, {"e", parameter({9, 6})}},
      "def forward(self, x: Tensor) -> Tensor:\n" + std::string(test.body) + "    return out\n");
}

std::shared_ptr<torch::jit::Graph> lowered(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  raise_linear(graph, module);
  graph->lint();
  return graph;
}

class RaiseLinear : public ::testing::TestWithParam<Case> {};

TEST_P(RaiseLinear, BecomesLinear) {
  auto module = module_of(GetParam());
  const auto graph = lowered(module);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 1u);
  for (const char* kind : {"aten::matmul", "aten::mm", "aten::addmm", "aten::add", "aten::view", "aten::reshape"}) {
    EXPECT_EQ(count_kind(*graph, kind), std::string(GetParam().others) == kind ? 1u : 0u) << kind;
  }
  expect_same_results(module, graph);
  const torch::jit::Node* linear = only_linear(*graph);
  ASSERT_NE(linear, nullptr);
  const WeightSource source = weight_source(linear->input(1), module);
  EXPECT_TRUE(source.path == "w" || source.path == "v") << source.path;
}

INSTANTIATE_TEST_SUITE_P(
    Spellings, RaiseLinear,
    ::testing::Values(
        Case{"matmul", "    out = torch.matmul(x, self.w)\n", ""},
        Case{"matmul_transposed", "    out = x @ self.v.t()\n", ""},
        Case{"matmul_swapped", "    out = torch.matmul(x, self.v.transpose(0, 1))\n", ""},
        Case{"matmul_bias", "    out = torch.matmul(x, self.w) + self.b\n", ""},
        Case{"bias_first", "    out = self.b + torch.matmul(x, self.w)\n", ""},
        Case{"mm", "    out = torch.mm(x[0], self.w)\n", ""},
        Case{"addmm", "    out = torch.addmm(self.b, x[0], self.w)\n", ""},
        Case{"addmm_of_a_residual", "    out = torch.addmm(x[1][:, 1:5], x[0], self.w)\n", "aten::add"},
        Case{"bias_behind_a_residual", "    out = (x[:, :, 1:5] + torch.matmul(x, self.w)) + self.b\n", "aten::add"},
        Case{"bias_before_a_sum_with_a_residual", "    out = self.b + (torch.matmul(x, self.w) + x[:, :, 1:5])\n",
             "aten::add"},
        Case{"product_read_twice", R"python(
    y = torch.matmul(x, self.w)
    out = (y + self.b) * torch.tanh(y)
)python",
             "aten::add"},
        Case{"bias_scaled", "    out = torch.add(torch.matmul(x, self.w), self.b, alpha=2.0)\n", "aten::add"}),
    [](const auto& info) { return info.param.name; });

class LeaveProductAlone : public RaiseLinear {};

TEST_P(LeaveProductAlone, TheGraphStays) {
  auto module = module_of(GetParam());
  const auto graph = lowered(module);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 0u);
  expect_same_results(module, graph);
}

INSTANTIATE_TEST_SUITE_P(
    Others, LeaveProductAlone,
    ::testing::Values(Case{"weight_on_the_left", "    out = torch.matmul(self.v, x.transpose(1, 2))\n", ""},
                      Case{"two_inputs", "    out = torch.matmul(x, x.transpose(1, 2))\n", ""},
                      Case{"weight_of_rank_3", "    out = torch.matmul(x, torch.unsqueeze(self.w, 0))\n", ""},
                      Case{"weight_computed", "    out = torch.matmul(x, torch.tanh(self.w))\n", ""},
                      Case{"scaled_addmm", "    out = torch.addmm(self.b, x[0], self.w, beta=0.5)\n", ""}),
    [](const auto& info) { return info.param.name; });

TEST(RaiseLinear, ABiasBehindAResidualIsOfTheOneMapThatLacksIt) {
  const auto biases = [](const char* body) {
    auto module = module_of({"", body, ""});
    const auto graph = lowered(module);
    expect_same_results(module, graph);
    int64_t count = 0;
    for_each_node(graph->block(), [&](torch::jit::Node* node) {
      count += is_aten(node, {"linear"}) && !is_none(node->namedInput("bias"));
    });
    return count;
  };
  EXPECT_EQ(biases("    out = (x[:, :, 1:5] + torch.matmul(x, self.w)) + self.b\n"), 1);
  EXPECT_EQ(biases("    out = (torch.matmul(x, self.w) + self.b + torch.matmul(x * 2, self.w)) + self.b\n"), 2);
  EXPECT_EQ(biases("    out = (torch.matmul(x, self.w) + torch.matmul(x * 2, self.w)) + self.b\n"), 0);
  EXPECT_EQ(biases("    y = x[:, :, 1:5] + torch.matmul(x, self.w)\n    out = (y + self.b) * y\n"), 0);
}

// Freezing makes constants of parameters; that of a transposed parameter is [in, out].
TEST(RaiseLinear, AProductWithAConstantOfAFrozenModuleBecomesLinear) {
  auto module = module_of({"", "    out = x @ self.v.t() + self.b\n", ""});
  const at::Tensor x = at::randn({2, 5, 6});
  const at::Tensor expected = module.forward({x}).toTensor();
  const auto frozen = torch::jit::freeze_module(module);
  const auto graph = lowered(frozen);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 1u);
  EXPECT_EQ(count_kind(*graph, "aten::matmul") + count_kind(*graph, "aten::add"), 0u);
  EXPECT_LT(largest_difference(expected, run_graph(frozen, graph, {x}).toTensor()), 1e-6);
}

}  // namespace
}  // namespace torchgraft
