#include "packed_support.h"

#include <torchgraft/patch/canonicalise/canonicalise.h>
#include <torchgraft/patch/canonicalise/decompose_linear_relu.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::make_packed_module;
using testing::packed_int8;
using testing::run_graph;

TEST(DecomposeLinearRelu, GivesTheSameNumbers) {
  at::manual_seed(0);
  const auto module = make_packed_module(packed_int8(at::randn({9, 6})), "quantized::linear_relu_dynamic");
  const auto graph = module.get_method("forward").graph()->copy();
  decompose_linear_relu(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "quantized::linear_dynamic"), 1u);
  EXPECT_EQ(count_kind(*graph, "aten::relu"), 1u);
  EXPECT_EQ(count_kind(*graph, "quantized::linear_relu_dynamic"), 0u);
  const at::Tensor x = at::randn({4, 5, 6});
  const at::Tensor expected = run_graph(module, module.get_method("forward").graph(), {x}).toTensor();
  const at::Tensor actual = run_graph(module, graph, {x}).toTensor();
  EXPECT_TRUE(at::equal(actual, expected));
  EXPECT_GT(expected.gt(0).sum().item<int64_t>(), 10);
  EXPECT_GT(expected.eq(0).sum().item<int64_t>(), 10);
}

TEST(DecomposeLinearRelu, IsAPassOfTheCanonicalForm) {
  const auto module = make_packed_module(packed_int8(at::randn({9, 6})), "quantized::linear_relu_dynamic");
  const CanonicalGraph canonical = canonicalise(module, "forward");
  EXPECT_EQ(count_kind(*canonical.graph, "quantized::linear_dynamic"), 1u);
}

}  // namespace
}  // namespace torchgraft
