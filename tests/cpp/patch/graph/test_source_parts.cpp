#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/source_parts.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/constant_propagation.h>

#include <cmath>

namespace torchgraft {
namespace {

// What TorchScript reads `literal` as.
c10::IValue read_back(const std::string& literal) {
  auto graph = compile_graph("def f():\n    return " + literal + "\n", "f");
  torch::jit::ConstantPropagation(graph);
  return *torch::jit::toIValue(graph->outputs().at(0));
}

TEST(SourceParts, NumbersReadBackAsTheSameDouble) {
  for (const double number : {-9000.0, 0.01, 1.0 / 3.0, 1e300, -1e-300, 0.0, 1e22}) {
    const c10::IValue value = read_back(number_source(number));
    ASSERT_TRUE(value.isDouble()) << number_source(number);
    EXPECT_EQ(value.toDouble(), number) << number_source(number);
  }
}

TEST(SourceParts, AdditiveMask) {
  torch::jit::CompilationUnit unit;
  unit.define(std::nullopt, additive_mask_source(), torch::jit::nativeResolver(), /*self=*/nullptr);
  const at::Tensor blocked = at::tensor({1, 0}).to(at::kBool).view({1, 2});
  const at::Tensor mask = unit.get_function("additive_mask")({blocked, c10::IValue(at::kDouble)}).toTensor();
  EXPECT_EQ(mask.scalar_type(), at::kDouble);
  EXPECT_TRUE(at::equal(mask, at::tensor({-INFINITY, 0.0F}).to(at::kDouble).view({1, 2})));
}

}  // namespace
}  // namespace torchgraft
