#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/head_order.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_module;

// q is [B, S, 12]: 3 heads of 4. `body` makes `out`, whose first dimension is looked at.
struct Case {
  const char* name;
  const char* body;
  HeadOrder order;
};

class HeadOrders : public ::testing::TestWithParam<Case> {};

TEST_P(HeadOrders, AreReadFromWhatMakesThem) {
  const std::string head = R"python(
def forward(self, x: Tensor):
    q = torch.linear(x, self.w)
)python";
  const auto module = make_module({{"w", at::randn({12, 12})}}, head + GetParam().body + "    return out\n");
  const auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  SymbolicShapes shapes(module);
  EXPECT_EQ(head_order(shapes, graph->outputs()[0]), GetParam().order);
}

INSTANTIATE_TEST_SUITE_P(
    Of, HeadOrders,
    ::testing::Values(
        Case{"HeadsInRows", "    out = q.view(x.size(0), x.size(1), 3, 4).transpose(1, 2).reshape(-1, x.size(1), 4)\n",
             HeadOrder::kHeadsInRows},
        Case{"TokensFirst",
             "    out = q.transpose(0, 1).contiguous().view(x.size(1), x.size(0) * 3, 4).transpose(0, 1) * 2.0\n",
             HeadOrder::kHeadsInRows},
        Case{"Repeated", "    out = torch.repeat_interleave(q, 3, 0)\n", HeadOrder::kHeadsInRows},
        Case{"OneHead", "    out = q\n", HeadOrder::kHeadsInRows},
        Case{"RotatedHalves",
             "    y = q.view(x.size(0), x.size(1), 3, 4).transpose(1, 2).flatten(0, 1)\n"
             "    out = torch.cat([torch.neg(y.narrow(-1, 2, 2)), y.narrow(-1, 0, 2)], -1)\n",
             HeadOrder::kHeadsInRows},
        Case{"Permuted", "    out = q.view(x.size(0), x.size(1), 3, 4).permute([2, 0, 1, 3]).flatten(0, 1)\n",
             HeadOrder::kRowsInHeads},
        Case{"Stacked",
             "    out = torch.stack([q.narrow(-1, 0, 4), q.narrow(-1, 4, 4), q.narrow(-1, 8, 4)], 0).flatten(0, 1)\n",
             HeadOrder::kRowsInHeads},
        Case{"Joined", "    out = torch.cat([q.narrow(-1, 0, 4), q.narrow(-1, 4, 4), q.narrow(-1, 8, 4)], 0)\n",
             HeadOrder::kRowsInHeads},
        Case{"RotatedByAMatrix",
             "    y = q.view(x.size(0), x.size(1), 3, 4).permute([2, 0, 1, 3]).flatten(0, 1)\n"
             "    out = torch.matmul(torch.ones([x.size(1), x.size(1)]), y)\n",
             HeadOrder::kRowsInHeads},
        Case{"JoinedInReverse",
             "    out = torch.cat([q.narrow(-1, 8, 4), q.narrow(-1, 4, 4), q.narrow(-1, 0, 4)], 0)\n",
             HeadOrder::kUnknown},
        Case{"PiecesOfTokens", "    out = torch.cat([q.narrow(1, 0, 2), q.narrow(1, 2, 2)], 0)\n", HeadOrder::kUnknown},
        Case{"Squeezed",
             "    y = q.view(x.size(0), x.size(1), 3, 4).transpose(1, 2).reshape(1, -1, x.size(1), 4)\n"
             "    out = torch.layer_norm(y.squeeze(0), [4])\n",
             HeadOrder::kHeadsInRows},
        Case{"JoinedFromElsewhere", "    out = torch.cat([q, q + 1, q * 2], 0)\n", HeadOrder::kUnknown},
        Case{"BetweenTokens",
             "    out = q.view(x.size(0), x.size(1), 3, 4).permute([0, 2, 1, 3]).permute([2, 1, 0, 3]).flatten(1, 2)\n"
             "    out = out.transpose(0, 1)\n",
             HeadOrder::kRowsInHeads},
        Case{"BeforeTheProjection", "    out = torch.linear(torch.cat([q, q * 2], 0), self.w)\n", HeadOrder::kUnknown}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace torchgraft
