#include "support.h"

#include <torchgraft/patch/insert/fuse_projections.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/ir/irparser.h>
#include <torch/csrc/jit/testing/file_check.h>

namespace torchgraft {
namespace {

constexpr const char* kHead = R"IR(
graph(%x : Tensor, %y : Tensor, %w : Tensor, %b : Tensor, %a : Tensor, %c : Tensor, %s : Tensor):
  %none : NoneType = prim::Constant()
  %zero : int = prim::Constant[value=0]()
)IR";

std::shared_ptr<torch::jit::Graph> parse(const std::string& body) {
  auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(kHead + body, graph.get());
  return graph;
}

TEST(FuseProjections, ALinearMapAndItsLoraBecomeOneOp) {
  const auto graph = parse(R"IR(
  %base : Tensor = aten::linear(%x, %w, %b)
  %out : Tensor, %gate : Tensor = torchgraft::gated_lora(%x, %base, %a, %c, %s, %none, %none, %none, %zero, %none)
  return (%out, %gate)
)IR");
  EXPECT_EQ(fuse_projections(graph), 1u);
  graph->lint();
  torch::jit::testing::FileCheck()
      .check_not("aten::linear")
      ->check("torchgraft::gated_lora_linear(%x, %w, %b, %a, %c, %s, ")
      ->check_not("torchgraft::gated_lora(")
      ->run(*graph);
}

TEST(FuseProjections, ALinearMapThatIsReadElsewhereStays) {
  const auto graph = parse(R"IR(
  %base : Tensor = aten::linear(%x, %w, %b)
  %out : Tensor, %gate : Tensor = torchgraft::gated_lora(%x, %base, %a, %c, %s, %none, %none, %none, %zero, %none)
  return (%out, %base)
)IR");
  EXPECT_EQ(fuse_projections(graph), 0u);
}

TEST(FuseProjections, ALoraOnAnotherInputStays) {
  const auto graph = parse(R"IR(
  %base : Tensor = aten::linear(%y, %w, %b)
  %out : Tensor, %gate : Tensor = torchgraft::gated_lora(%x, %base, %a, %c, %s, %none, %none, %none, %zero, %none)
  return (%out, %gate)
)IR");
  EXPECT_EQ(fuse_projections(graph), 0u);
}

constexpr const char* kBottleneckHead = R"IR(
graph(%x : Tensor, %h : Tensor, %w : Tensor, %b : Tensor, %d : Tensor, %e : Tensor, %u : Tensor, %f : Tensor,
      %s : Tensor):
  %none : NoneType = prim::Constant()
  %zero : int = prim::Constant[value=0]()
  %relu : str = prim::Constant[value="relu"]()
)IR";

constexpr const char* kBottleneckOp =
    "torchgraft::gated_bottleneck(%x, %y, %d, %e, %u, %f, %s, %relu, %none, %none, %none, %zero, %none)";

// A gated_bottleneck on %y, which `body` defines. `returned`: more values for the graph to return.
std::shared_ptr<torch::jit::Graph> bottleneck_graph(const std::string& body, const std::string& returned = "") {
  auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(std::string(kBottleneckHead) + body + "\n  %o : Tensor, %g : Tensor = " + kBottleneckOp +
                          "\n  return (%o, %g" + returned + ")\n",
                      graph.get());
  return graph;
}

TEST(FuseProjections, ALinearMapAndItsParallelBottleneckBecomeOneOp) {
  for (const std::string bias : {"%b", "%none"}) {
    const auto graph = bottleneck_graph("  %y : Tensor = aten::linear(%h, %w, " + bias + ")");
    EXPECT_EQ(fuse_projections(graph), 1u);
    graph->lint();
    torch::jit::testing::FileCheck()
        .check_not("aten::linear")
        ->check("torchgraft::gated_bottleneck_linear(%x, %h, %w, ")
        ->check_same(", %d, %e, %u, %f, %s, ")
        ->check_not("torchgraft::gated_bottleneck(")
        ->run(*graph);
  }
}

TEST(FuseProjections, ALinearMapOfABottleneckStaysWhenItIsReadElsewhereOrItsInputChanges) {
  const std::string linear = "  %y : Tensor = aten::linear(%h, %w, %b)";
  EXPECT_EQ(fuse_projections(bottleneck_graph(linear, ", %y")), 0u) << "returned";
  EXPECT_EQ(fuse_projections(bottleneck_graph(linear + "\n  %z : Tensor = aten::relu(%y)", ", %z")), 0u)
      << "read twice";
  EXPECT_EQ(fuse_projections(bottleneck_graph(linear + "\n  %z : Tensor = aten::relu_(%h)", ", %z")), 0u)
      << "its input changes before the bottleneck";
  const std::string dropout = R"IR(
  %off : bool = prim::Constant[value=0]()
  %p : float = prim::Constant[value=0.1]()
  %l : Tensor = aten::linear(%h, %w, %b)
  %y : Tensor = aten::dropout(%l, %p, %off))IR";
  EXPECT_EQ(fuse_projections(bottleneck_graph(dropout, ", %y")), 0u) << "dropout's result is read";
  EXPECT_EQ(fuse_projections(bottleneck_graph(dropout, ", %l")), 0u) << "read before dropout";
  EXPECT_EQ(fuse_projections(bottleneck_graph(dropout)), 1u);
}

TEST(FuseProjections, DropoutTracedInTrainingModePreventsFusing) {
  for (const std::string train : {"0", "1"}) {
    const auto graph = bottleneck_graph("  %train : bool = prim::Constant[value=" + train + R"IR(]()
  %p : float = prim::Constant[value=0.1]()
  %l : Tensor = aten::linear(%h, %w, %b)
  %y : Tensor = aten::dropout(%l, %p, %train))IR");
    EXPECT_EQ(fuse_projections(graph), train == "1" ? 0u : 1u);
    graph->lint();
    EXPECT_EQ(testing::count_kind(*graph, "aten::dropout"), train == "1" ? 1u : 0u);
  }
}

TEST(FuseProjections, ASequentialBottleneckReadsTheLinearMapTwiceAndStays) {
  auto graph = std::make_shared<torch::jit::Graph>();
  std::string text = kBottleneckHead;
  text += R"IR(
  %y : Tensor = aten::linear(%h, %w, %b)
  %o : Tensor, %g : Tensor = torchgraft::gated_bottleneck(%y, %y, %d, %e, %u, %f, %s, %relu, %none, %none,
                                                          %none, %zero, %none)
  return (%o, %g)
)IR";
  torch::jit::parseIR(text, graph.get());
  EXPECT_EQ(fuse_projections(graph), 0u);
}

}  // namespace
}  // namespace torchgraft
