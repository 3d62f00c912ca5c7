#include "support.h"

#include <torchgraft/patch/passes/fold_attributes.h>
#include <torchgraft/patch/passes/lower_linear_forms.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// `body` on x [2, 5, 3] with the parameters w [3, 4], wt [4, 3] and b [4]; `before` makes x's rank known.
void expect_linears(const std::string& body, size_t linears) {
  at::manual_seed(0);
  const auto module = make_module(
      {{"w", at::randn({3, 4})}, {"wt", at::randn({4, 3})}, {"b", at::randn({4})}, {"v", at::randn({3, 3})}},
      "def forward(self, y: Tensor) -> Tensor:\n    x = torch.linear(y, self.v)\n" + body);
  const auto before = module.get_method("forward").graph()->copy();
  simplify(before);
  const auto after = before->copy();
  lower_linear_forms(after, module);
  simplify(after);
  after->lint();
  EXPECT_EQ(count_kind(*after, "aten::linear"), linears + 1) << after->toString();
  const at::Tensor y = at::randn({2, 5, 3});
  const at::Tensor expected = run_graph(module, before, {y}).toTensor();
  const at::Tensor result = run_graph(module, after, {y}).toTensor();
  EXPECT_EQ(result.sizes(), expected.sizes());
  EXPECT_LE(largest_difference(result, expected), 1e-6);
}

TEST(LowerLinearForms, AddmmBetweenViews) {
  expect_linears(
      "    z = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w)\n"
      "    return z.view(x.size(0), x.size(1), 4)\n",
      1);
}

// The first dimensions come back in another order: only the product on two dimensions may become a linear.
TEST(LowerLinearForms, ViewsThatDoNotMatchStay) {
  expect_linears(
      "    z = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w)\n"
      "    return z.view(x.size(1), x.size(0), 4)\n",
      1);
}

TEST(LowerLinearForms, MatmulWithAndWithoutBias) {
  expect_linears("    return torch.matmul(x, self.w)\n", 1);
  expect_linears("    return torch.matmul(x, self.w) + self.b\n", 1);
  expect_linears("    return self.b + torch.matmul(x, self.wt.t())\n", 1);
  expect_linears("    z = torch.matmul(x, self.w)\n    return z + self.b + z.relu()\n", 1);
}

TEST(LowerLinearForms, OtherProductsStay) {
  expect_linears("    return torch.matmul(x, x.transpose(1, 2))\n", 0);
  expect_linears("    return torch.addmm(self.b, x[0], self.w, beta=1, alpha=2)\n", 0);
}

}  // namespace
}  // namespace torchgraft
