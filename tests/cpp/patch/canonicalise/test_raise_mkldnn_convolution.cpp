#include "support.h"

#include <torchgraft/patch/canonicalise/raise_mkldnn_convolution.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/ir/irparser.h>
#include <torch/csrc/jit/passes/freeze_module.h>
#include <torch/csrc/jit/passes/frozen_ops_to_mkldnn.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::error_of;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

TEST(RaiseMkldnnConvolution, ConvolutionsBecomeDenseAgain) {
  if (!at::hasMKLDNN()) {
    GTEST_SKIP() << "torch was built without oneDNN";
  }
  at::manual_seed(0);
  const auto module = make_module({{"w", at::randn({4, 3, 2, 2})}, {"b", at::randn({4})}}, R"python(
def forward(self, x: Tensor) -> Tensor:
    return torch.tanh(torch.conv2d(x, self.w, self.b, [2, 2], [1, 1], [1, 1], 1))
)python");
  const auto frozen = torch::jit::freeze_module(module);
  auto graph = frozen.get_method("forward").graph()->copy();
  torch::jit::ConvertFrozenOpsToMKLDNN(graph);
  ASSERT_EQ(count_kind(*graph, "aten::to_mkldnn"), 1u) << *graph;
  raise_mkldnn_convolution(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "aten::to_mkldnn") + count_kind(*graph, "aten::to_dense") +
                count_kind(*graph, "prim::mkldnn_convolution") + count_kind(*graph, "prim::ConstantMKLDNNTensor"),
            0u);
  const at::Tensor x = at::randn({2, 3, 8, 8});
  EXPECT_LT(largest_difference(run_graph(frozen, graph, {x}).toTensor(),
                               run_graph(module, module.get_method("forward").graph(), {x}).toTensor()),
            1e-5);
}

TEST(RaiseMkldnnConvolution, OtherOpsAreNamedWithTheRemedy) {
  auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(R"IR(
graph(%x : Tensor):
  %y : Tensor = prim::MKLDNNHardSwish(%x)
  return (%y)
)IR",
                      graph.get());
  const std::string error = error_of([&] { raise_mkldnn_convolution(graph); });
  EXPECT_NE(error.find("prim::MKLDNNHardSwish"), std::string::npos) << error;
  EXPECT_NE(error.find("graft the module first"), std::string::npos) << error;
}

}  // namespace
}  // namespace torchgraft
