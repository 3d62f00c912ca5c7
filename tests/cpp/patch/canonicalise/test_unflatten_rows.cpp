#include "linear_support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_linear.h>
#include <torchgraft/patch/canonicalise/unflatten_rows.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::expect_same_results;
using testing::make_module;
using testing::only_linear;

// Linear maps of x [2, 5, 6] by `w` [6, 4] and `u` [4, 6], with biases `b` [4] and `c` [6]. `body` makes `out`.
torch::jit::Module module_of(const std::string& body) {
  at::manual_seed(0);
  const auto parameter = [](at::IntArrayRef sizes) { return at::randn(sizes).requires_grad_(); };
  return make_module({{"w", parameter({6, 4})},
                      {"u", parameter({4, 6})},
                      {"b", parameter({4})},
                      {"c", parameter({6})},
                      {"e", parameter({9, 6})}},
                     "def forward(self, x: Tensor) -> Tensor:\n" + body + "    return out\n");
}

std::shared_ptr<torch::jit::Graph> unflattened(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  raise_linear(graph, module);
  unflatten_rows(graph, module);
  graph->lint();
  return graph;
}

// The input of this Conv1D has a known shape: both views go away, and the linear map reads the tokens.
TEST(UnflattenRows, TheLinearMapOfAConv1dReadsTheTokens) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0])
    y = torch.addmm(self.b, h.view(-1, h.size(2)), self.w).view(h.size(0), h.size(1), 4)
    out = torch.tanh(y) + x.sum()
)python");
  const auto graph = unflattened(module);
  EXPECT_EQ(count_kind(*graph, "aten::view"), 0u);
  const torch::jit::Node* linear = only_linear(*graph);
  ASSERT_NE(linear, nullptr);
  EXPECT_TRUE(is_aten(linear->input(0)->node(), {"embedding"}));
  expect_same_results(module, graph);
}

// The view back has the leading dimensions in another order: the elements are the same, but the view must stay.
TEST(UnflattenRows, ViewsThatRestoreAnotherShapeStay) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0])
    y = torch.addmm(self.b, h.view(-1, h.size(2)), self.w).view(h.size(1), h.size(0), 4)
    out = torch.tanh(y) + x.sum()
)python");
  const auto graph = unflattened(module);
  EXPECT_EQ(count_kind(*graph, "aten::view"), 1u);
  ASSERT_NE(only_linear(*graph), nullptr);
  expect_same_results(module, graph);
}

// A view that merges dimensions into the rows' width does not flatten rows.
TEST(UnflattenRows, RowsOfMergedHeadsStayFlat) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0]).view(2, 5, 3, 2) + x.sum()
    out = torch.mm(h.reshape(-1, 6), self.w).view(2, 5, 4)
)python");
  const auto graph = unflattened(module);
  const torch::jit::Node* linear = only_linear(*graph);
  ASSERT_NE(linear, nullptr);
  EXPECT_TRUE(is_aten(linear->input(0)->node(), {"reshape"}));
  expect_same_results(module, graph);
}

TEST(UnflattenRows, AViewOfRowsAsHeadsBecomesOneOfTheTokens) {
  auto module = module_of(R"python(
    y = torch.mm(x.view(-1, x.size(-1)), self.w) + self.b
    out = y.view(x.size(0), x.size(1), 2, 2)
)python");
  const auto graph = unflattened(module);
  EXPECT_EQ(count_kind(*graph, "aten::view"), 1u);
  const torch::jit::Node* linear = only_linear(*graph);
  ASSERT_NE(linear, nullptr);
  EXPECT_EQ(linear->input(0), graph->inputs()[1]);
  expect_same_results(module, graph);
}

// A whole feed-forward block on flattened rows, gated and with a constant added.
TEST(UnflattenRows, AFeedForwardBlockKeepsNoView) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0])
    rows = h.reshape(-1, 6)
    inner = torch.addmm(self.b, rows, self.w)
    inner = inner * torch.sigmoid(1.7 * inner) + self.b
    y = torch.addmm(self.c, inner, self.u).view(h.size(0), h.size(1), -1)
    out = y + h + x.sum()
)python");
  const auto graph = unflattened(module);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 2u);
  EXPECT_EQ(count_kind(*graph, "aten::view") + count_kind(*graph, "aten::reshape"), 0u);
  expect_same_results(module, graph);
}

// Code that the pass does not understand goes on reading rows: a sum over them, a product with rows of another tensor.
TEST(UnflattenRows, OtherReadersGetRows) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0]) + x.sum()
    y = torch.mm(h.reshape(-1, 6), self.w)
    z = torch.tanh(y) * x.transpose(0, 1).reshape(-1, 6)[:, :4]
    out = z.view(2, 5, 4) + y.sum(0)
)python");
  const auto graph = unflattened(module);
  ASSERT_NE(only_linear(*graph), nullptr);
  EXPECT_FALSE(is_aten(only_linear(*graph)->input(0)->node(), {"reshape"}));
  expect_same_results(module, graph);
}

// flatten(y, 1) of rows counts their two dimensions, not those of the tokens.
TEST(UnflattenRows, FlattenedRowsStayRows) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0]) + x.sum()
    y = torch.mm(h.reshape(-1, 6), self.w)
    out = torch.flatten(y, 1) * 2 + y
)python");
  expect_same_results(module, unflattened(module));
}

// Rows that were flattened from dimensions in another order are as many, but they are not the same rows.
TEST(UnflattenRows, RowsOfOtherOrderStayApart) {
  auto module = module_of(R"python(
    h = torch.embedding(self.e, x.long().clamp(0, 8)[:, :, 0]) + x.sum()
    first = torch.mm(h.reshape(-1, 6), self.w)
    second = torch.mm(h.transpose(0, 1).reshape(-1, 6), self.w)
    out = (first * second).view(2, 5, 4)
)python");
  expect_same_results(module, unflattened(module));
}

}  // namespace
}  // namespace torchgraft
