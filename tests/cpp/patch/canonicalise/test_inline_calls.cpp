#include "support.h"

#include <torchgraft/patch/canonicalise/inline_calls.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;

torch::jit::Module nested_module() {
  torch::jit::Module inner("Inner");
  inner.register_parameter("w", at::randn({4, 4}), false);
  inner.define(R"python(
def twice(self, x: Tensor) -> Tensor:
    return torch.linear(torch.linear(x, self.w), self.w)

def forward(self, x: Tensor) -> Tensor:
    if x.size(0) > 100:
        return self.twice(x)
    return torch.relu(self.twice(x))
)python");
  torch::jit::Module outer("Outer");
  outer.register_module("inner", inner);
  outer.define("def forward(self, x: Tensor) -> Tensor:\n    return self.inner.forward(self.inner.forward(x))\n");
  return outer;
}

TEST(InlineCalls, LeavesOneFlatGraphThatComputesTheSame) {
  const auto module = nested_module();
  const auto graph = module.get_method("forward").graph()->copy();
  inline_calls(graph, [](torch::jit::Node*) { return false; });
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "prim::CallMethod"), 0u);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 8u);
  const at::Tensor x = at::randn({3, 4});
  auto copy = module.clone();
  EXPECT_TRUE(at::equal(copy.forward({x}).toTensor(), testing::run_graph(module, graph, {x}).toTensor()));
}

TEST(InlineCalls, OffersEveryMethodCallForDecomposing) {
  const auto module = nested_module();
  const auto graph = module.get_method("forward").graph()->copy();
  std::vector<std::string> offered;
  inline_calls(graph, [&](torch::jit::Node* call) {
    offered.push_back(call->s(c10::attr::name));
    if (offered.back() == "twice") {  // replaces the call by its input
      call->output()->replaceAllUsesWith(call->input(1));
      call->destroy();
      return true;
    }
    return false;
  });
  EXPECT_EQ(offered, (std::vector<std::string>{"forward", "twice", "twice", "forward", "twice", "twice"}));
  EXPECT_EQ(count_kind(*graph, "aten::linear"), 0u);
}

TEST(InlineCalls, LeavesTheModuleUnchanged) {
  const auto module = nested_module();
  const std::string before = module.get_method("forward").graph()->toString(false);
  const auto graph = module.get_method("forward").graph()->copy();
  inline_calls(graph, [](torch::jit::Node*) { return false; });
  EXPECT_EQ(module.get_method("forward").graph()->toString(false), before);
}

}  // namespace
}  // namespace torchgraft
