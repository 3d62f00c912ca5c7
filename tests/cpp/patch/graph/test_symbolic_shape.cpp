#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/graph/symbolic_shape.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_module;

// Prints a shape as "a*8, 5". Symbols are letters, in the order in which they first appear.
std::string printed(const std::optional<Shape>& shape) {
  if (!shape) {
    return "unknown";
  }
  std::map<int, char> letters;
  std::string result;
  for (const Dim& dim : *shape) {
    result += result.empty() ? "" : ", ";
    std::string text;
    for (const int symbol : dim.symbols) {
      const auto letter = letters.emplace(symbol, static_cast<char>('a' + letters.size())).first;
      text += (text.empty() ? "" : "*") + std::string(1, letter->second);
    }
    if (dim.factor != 1 || text.empty()) {
      text += (text.empty() ? "" : "*") + std::to_string(dim.factor);
    }
    result += text;
  }
  return result;
}

// forward(x): nothing is known of x.
std::string shape_without_assumptions(const std::string& body) {
  const auto module =
      make_module({{"w", at::randn({12, 8})}, {"table", at::randn({30, 8})}, {"image", at::randn({8, 3, 4, 4})}},
                  "def forward(self, x: Tensor):\n" + body);
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  SymbolicShapes shapes(module);
  return printed(shapes.shape(graph->outputs()[0]));
}

std::string shape_of_result(const std::string& body) {
  return shape_without_assumptions("    y = torch.linear(x, self.w)\n" + body);
}

TEST(SymbolicShape, LinearAssumesBatchedTokens) { EXPECT_EQ(shape_of_result("    return y\n"), "a, b, 12"); }

TEST(SymbolicShape, ViewInfersTheMissingSize) {
  EXPECT_EQ(shape_of_result("    return y.view(y.size(0), -1, 3, 4)\n"), "a, b, 3, 4");
  EXPECT_EQ(shape_of_result("    return y.view(y.size(0) * 3, -1, 4)\n"), "a*3, b, 4");
}

TEST(SymbolicShape, LayoutOpsMoveSizesAlong) {
  EXPECT_EQ(shape_of_result("    return y.transpose(0, 1)\n"), "a, b, 12");  // "a" comes first, and is the tokens here
  EXPECT_EQ(shape_of_result("    return y.view(y.size(0), y.size(1), 3, 4).permute(2, 0, 1, 3)\n"), "3, a, b, 4");
  EXPECT_EQ(shape_of_result("    return y.unflatten(-1, [3, 4]).unsqueeze(0).transpose(0, -2).squeeze(-2)\n"),
            "3, a, b, 4");
  EXPECT_EQ(shape_of_result("    return y.flatten(0, 1)\n"), "a*b, 12");
  EXPECT_EQ(shape_of_result("    return y.unflatten(-1, [3, 4]).select(2, 1)\n"), "a, b, 4");
}

TEST(SymbolicShape, CopiesAreAsManyMore) {
  EXPECT_EQ(shape_of_result("    return y.repeat([3, 1, 2])\n"), "a*3, b, 24");
  EXPECT_EQ(shape_of_result("    return torch.zeros_like(y).repeat([2, 1, 1, 1])\n"), "2, a, b, 12");
}

TEST(SymbolicShape, PiecesOfAConstantSizeHaveAConstantSize) {
  EXPECT_EQ(shape_of_result("    a, b, c = y.chunk(3, -1)\n    return b\n"), "a, b, 4");
  EXPECT_EQ(shape_of_result("    return y.slice(2, 4, 8)\n"), "a, b, 4");
}

TEST(SymbolicShape, ConcatenatedSizesAddUp) {
  EXPECT_EQ(shape_of_result("    return torch.cat([y, y[..., :4], y], -1)\n"), "a, b, 28");
  EXPECT_EQ(shape_of_result("    return torch.cat([y, y], 0)\n"), "a*2, b, 12");
}

// forward(past, y): `past` is of unknown shape until it meets y.
std::string shape_with_cache(const std::string& body) {
  const auto module = make_module({{"w", at::randn({12, 8})}, {"nothing", at::randn({0})}},
                                  "def forward(self, past: Tensor, x: Tensor, places: Tensor):\n"
                                  "    y = torch.linear(x, self.w).unflatten(-1, [3, 4]).transpose(1, 2)\n" +
                                      body);
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  SymbolicShapes shapes(module);
  return printed(shapes.shape(graph->outputs()[0]));
}

TEST(SymbolicShape, NewKeysSayWhatACacheIs) {
  EXPECT_EQ(shape_with_cache("    return torch.cat([past, y], 2)\n"), "a, 3, b, 4");
  EXPECT_EQ(shape_with_cache("    return torch.cat([torch.cat([self.nothing, past], -2), y], -2)\n"), "a, 3, b, 4");
  EXPECT_EQ(shape_with_cache("    return past.index_copy(2, places, y)\n"), "a, 3, b, 4");
  EXPECT_EQ(shape_with_cache("    return past.scatter(2, places, y)\n"), "a, 3, b, 4");
  EXPECT_EQ(shape_with_cache("    return past.slice_scatter(y, 2, 1, 4)\n"), "a, 3, b, 4");
  EXPECT_EQ(shape_with_cache("    past[:, :, places] = y\n    return past.clone()\n"), "unknown");
}

// GPT-2 views its token ids, whose rank a graph does not tell, and what its layers make of them with the same sizes.
TEST(SymbolicShape, AViewOfAnUnknownTensorHasARank) {
  const char* ids =
      "    ids = x.view(-1, x.size(1))\n    tokens = torch.embedding(self.table, ids, -1, False, False)\n";
  EXPECT_EQ(shape_without_assumptions(std::string(ids) + "    return tokens.view(-1, x.size(1), 8)\n"), "a, b, 8");
  EXPECT_EQ(shape_without_assumptions("    return x.expand(-1, -1, 5)\n"), "a, b, 5");
}

TEST(SymbolicShape, ASizeThatDoesNotDivideLeavesTheRestUnknown) {
  EXPECT_EQ(shape_of_result("    return y.view(-1, 5)\n"), "a, 5");
  EXPECT_EQ(shape_of_result("    return y.chunk(5, -1)[0]\n"), "a, b, c");
}

TEST(SymbolicShape, AnEmbeddingOfTokenIdsAddsItsWidth) {
  EXPECT_EQ(shape_of_result("    return torch.embedding(self.table, torch.argmax(y, -1))\n"), "a, b, 8");
}

TEST(SymbolicShape, PatchesOfAnImageBecomeTokens) {
  EXPECT_EQ(shape_of_result("    return torch.conv2d(x, self.image, None, [4, 4]).flatten(2).transpose(1, 2)\n"),
            "a, b*c, 8");
}

TEST(SymbolicShape, TheShapeOfNonzeroIsUnknown) {
  EXPECT_EQ(shape_of_result("    return torch.nonzero(y)\n"), "unknown");
}

}  // namespace
}  // namespace torchgraft
