#include "support.h"

#include <torchgraft/patch/passes/fuse_projections.h>

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

TEST(FuseProjections, ALinearMapAndItsLoraAreOneOp) {
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

TEST(FuseProjections, WhatElseIsReadStays) {
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

TEST(FuseProjections, ALinearMapAndItsParallelBottleneckAreOneOp) {
  auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(std::string(kBottleneckHead) + R"IR(
  %y : Tensor = aten::linear(%h, %w, %b)
  %o : Tensor, %g : Tensor = torchgraft::gated_bottleneck(%x, %y, %d, %e, %u, %f, %s, %relu, %none, %none, %none, %zero, %none)
  return (%o, %g)
)IR", graph.get());
  EXPECT_EQ(fuse_projections(graph), 1u);
  graph->lint();
  torch::jit::testing::FileCheck()
      .check_not("aten::linear")
      ->check("torchgraft::gated_bottleneck_linear(%x, %h, %w, %b, %d, %e, %u, %f, %s, ")
      ->check_not("torchgraft::gated_bottleneck(")
      ->run(*graph);
}

// %y is what the bottleneck is added to.
std::string with_dropout(bool train) {
  return std::string(kBottleneckHead) + "  %train : bool = prim::Constant[value=" + (train ? "1" : "0") + R"IR(]()
  %p : float = prim::Constant[value=0.1]()
  %l : Tensor = aten::linear(%h, %w, %b)
  %y : Tensor = aten::dropout(%l, %p, %train)
  %o : Tensor, %g : Tensor = torchgraft::gated_bottleneck(%x, %y, %d, %e, %u, %f, %s, %relu, %none, %none, %none, %zero, %none)
  return (%o, %g)
)IR";
}

TEST(FuseProjections, DropoutThatWasTracedInEvalModeDoesNotStandBetween) {
  for (const bool train : {false, true}) {
    auto graph = std::make_shared<torch::jit::Graph>();
    torch::jit::parseIR(with_dropout(train), graph.get());
    EXPECT_EQ(fuse_projections(graph), train ? 0u : 1u);
    graph->lint();
    EXPECT_EQ(testing::count_kind(*graph, "aten::dropout"), train ? 1u : 0u);
  }
}

TEST(FuseProjections, ASequentialBottleneckReadsTheLinearMapTwiceAndStays) {
  auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(std::string(kBottleneckHead) + R"IR(
  %y : Tensor = aten::linear(%h, %w, %b)
  %o : Tensor, %g : Tensor = torchgraft::gated_bottleneck(%y, %y, %d, %e, %u, %f, %s, %relu, %none, %none, %none, %zero, %none)
  return (%o, %g)
)IR", graph.get());
  EXPECT_EQ(fuse_projections(graph), 0u);
}

}  // namespace
}  // namespace torchgraft
