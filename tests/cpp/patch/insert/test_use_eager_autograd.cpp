#include <torchgraft/patch/insert/use_eager_autograd.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/ir/irparser.h>
#include <torch/csrc/jit/passes/create_autodiff_subgraphs.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Stack;

// The operators between two attentions.
std::shared_ptr<Graph> feed_forward() {
  auto graph = std::make_shared<Graph>();
  torch::jit::parseIR(R"IR(
graph(%x : Tensor, %up : Tensor, %down : Tensor, %norm : Tensor):
  %none : NoneType = prim::Constant()
  %one : int = prim::Constant[value=1]()
  %eps : float = prim::Constant[value=1e-12]()
  %true : bool = prim::Constant[value=1]()
  %exact : str = prim::Constant[value="none"]()
  %size : int = prim::Constant[value=6]()
  %shape : int[] = prim::ListConstruct(%size)
  %wide : Tensor = aten::linear(%x, %up, %none)
  %active : Tensor = aten::gelu(%wide, %exact)
  %narrow : Tensor = aten::linear(%active, %down, %none)
  %sum : Tensor = aten::add(%x, %narrow, %one)
  %y : Tensor = aten::layer_norm(%sum, %shape, %norm, %norm, %eps, %true)
  return (%y)
)IR",
                      graph.get());
  return graph;
}

size_t joined_groups(const std::shared_ptr<Graph>& graph) {
  const auto copy = graph->copy();
  return torch::jit::CreateAutodiffSubgraphs(copy).size();
}

// The result, and the gradient of x.
std::vector<at::Tensor> run(const std::shared_ptr<Graph>& graph) {
  at::manual_seed(0);
  const at::Tensor x = at::randn({3, 6}).requires_grad_();
  torch::jit::GraphExecutor executor(graph, "forward");
  Stack stack{x, at::randn({24, 6}), at::randn({6, 24}), at::randn({6})};
  executor.run(stack);
  const at::Tensor y = stack.front().toTensor();
  y.square().sum().backward();
  return {y, x.grad()};
}

TEST(UseEagerAutograd, AliasesLeaveTorchScriptNothingToJoin) {
  const auto graph = feed_forward();
  EXPECT_EQ(joined_groups(graph), 1u);
  EXPECT_EQ(use_eager_autograd(graph), 4u);
  graph->lint();
  EXPECT_EQ(joined_groups(graph), 0u);
  EXPECT_EQ(use_eager_autograd(graph), 0u) << "a second run adds nothing";
}

TEST(UseEagerAutograd, ResultsKeepTheirBitsAndGradientsTheirValues) {
  const auto graph = feed_forward();
  const auto expected = run(graph->copy());
  use_eager_autograd(graph);
  const auto found = run(graph);
  EXPECT_TRUE(at::equal(found[0], expected[0]));
  EXPECT_TRUE(at::allclose(found[1], expected[1], 1e-6, 1e-6));
}

}  // namespace
}  // namespace torchgraft
