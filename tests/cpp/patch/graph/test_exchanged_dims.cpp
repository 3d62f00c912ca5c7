#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/graph/exchanged_dims.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_module;
using Dims = std::optional<std::vector<size_t>>;

// Of forward(x, i), whose last node is looked at.
Dims dims_of(const std::string& expression, size_t rank) {
  const auto module = make_module({}, "def forward(self, x: Tensor, i: int):\n    return " + expression + "\n");
  const auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  SymbolicShapes shapes(module);
  return exchanged_dims(shapes, graph->outputs()[0]->node(), rank);
}

TEST(ExchangedDims, TwoDimensionsAreExchanged) {
  const std::vector<size_t> expected = {0, 2, 1};
  EXPECT_EQ(dims_of("x.transpose(1, 2)", 3), expected);
  EXPECT_EQ(dims_of("x.swapaxes(-1, 1)", 3), expected);
  EXPECT_EQ(dims_of("x.swapdims(-2, -1)", 3), expected);
  EXPECT_EQ(dims_of("x.t()", 2), (std::vector<size_t>{1, 0}));
  EXPECT_EQ(dims_of("x.numpy_T()", 2), (std::vector<size_t>{1, 0}));
}

TEST(ExchangedDims, PermuteGivesTheOrder) {
  EXPECT_EQ(dims_of("x.permute(2, 0, -2)", 3), (std::vector<size_t>{2, 0, 1}));
}

TEST(ExchangedDims, ADimensionMayBeExchangedWithItself) {
  EXPECT_EQ(dims_of("x.transpose(1, -1)", 2), (std::vector<size_t>{0, 1}));
  EXPECT_EQ(dims_of("x.permute(0, 1)", 2), (std::vector<size_t>{0, 1}));
}

TEST(ExchangedDims, OtherOpsAndUnknownDimensionsGiveNothing) {
  EXPECT_EQ(dims_of("x.flatten(0, 1)", 3), std::nullopt);
  EXPECT_EQ(dims_of("x.transpose(0, i)", 3), std::nullopt);
  EXPECT_EQ(dims_of("x.transpose(0, 3)", 3), std::nullopt);
  EXPECT_EQ(dims_of("x.permute(1, 0)", 3), std::nullopt);
  EXPECT_EQ(dims_of("x.t()", 1), std::nullopt);
}

}  // namespace
}  // namespace torchgraft
