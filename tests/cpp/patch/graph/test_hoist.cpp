#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/hoist.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_module;
using torch::jit::Node;

// Whether the mask that `body` makes can be known before the projection, and whether its product was moved there.
std::pair<bool, bool> hoisted(const std::string& body) {
  const auto module = make_module({{"w", at::randn({4, 4})}}, "def forward(self, x: Tensor, mask: Tensor):\n" + body);
  const auto graph = module.get_method("forward").graph()->copy();
  Node* linear = nullptr;
  Node* product = nullptr;
  for_each_node(graph->block(), [&](Node* node) {
    linear = is_aten(node, {"linear"}) ? node : linear;
    product = is_aten(node, {"mul"}) ? node : product;
  });
  const bool known = Hoist(module)(product->output(), linear, graph->inputs()[1]);
  graph->lint();
  return {known, product->isBefore(linear)};
}

TEST(Hoist, MovesWhatDoesNotReadTheProjection) {
  EXPECT_EQ(hoisted(R"python(
    y = torch.linear(x, self.w)
    return y + mask * 2
)python"),
            std::pair(true, true));
}

TEST(Hoist, LeavesWhatReadsTheProjection) {
  EXPECT_EQ(hoisted(R"python(
    y = torch.linear(x, self.w)
    return y + y * 2
)python"),
            std::pair(false, false));
}

TEST(Hoist, LeavesWhatIsWrittenInPlaceOnTheWay) {
  EXPECT_EQ(hoisted(R"python(
    y = torch.linear(x, self.w)
    mask.add_(1)
    return y + mask * 2
)python"),
            std::pair(false, false));
}

}  // namespace
}  // namespace torchgraft
