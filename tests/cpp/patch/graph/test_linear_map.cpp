#include "packed_support.h"

#include <torchgraft/patch/graph/clone_module.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/linear_map.h>
#include <torchgraft/patch/graph/symbolic_shape.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_packed_module;
using testing::packed_int8;

constexpr const char* kOp = "quantized::linear_dynamic";

const torch::jit::Node* linear_of(const torch::jit::Module& module) {
  for (const torch::jit::Node* node : module.get_method("forward").graph()->nodes()) {
    if (is_linear(node)) {
      return node;
    }
  }
  return nullptr;
}

TEST(LinearMap, APackedOneHasInputPathAndSizes) {
  const c10::IValue packed = packed_int8(at::randn({9, 6}));
  const auto module = make_packed_module(packed, kOp);
  const torch::jit::Node* linear = linear_of(module);
  ASSERT_NE(linear, nullptr);
  EXPECT_TRUE(is_packed_linear(linear));
  EXPECT_EQ(linear_input(linear)->debugName(), module.get_method("forward").graph()->inputs()[1]->debugName());
  const WeightSource source = weight_source(linear_weight(linear), module);
  EXPECT_EQ(source.path, "packed");
  EXPECT_EQ(source.packed.get(), packed.toObject().get());
  EXPECT_FALSE(source.tensor.defined());
  EXPECT_FALSE(source.is_computed());
  const auto weight = packed_weight(source.packed);
  ASSERT_TRUE(weight.has_value());
  EXPECT_EQ(weight->rows, 9);
  EXPECT_EQ(weight->columns, 6);
  EXPECT_EQ(weight->dtype, "int8");
  SymbolicShapes shapes(module);
  EXPECT_EQ(shapes.shape(linear->output())->back(), number(9));
}

TEST(LinearMap, ADeadObjectIsNotTakenForAnother) {
  for (int64_t size = 1; size < 40; ++size) {  // allocators give the same addresses again
    const auto weight = packed_weight(packed_int8(at::randn({size, 3})));
    EXPECT_EQ(weight.value().rows, size);
  }
}

TEST(LinearMap, OtherValuesHoldNoPackedWeight) {
  EXPECT_FALSE(packed_weight(at::zeros({2, 2})).has_value());
  EXPECT_FALSE(packed_weight(c10::IValue()).has_value());
  const auto module = make_packed_module(packed_int8(at::ones({2, 2})), kOp);
  EXPECT_FALSE(packed_weight(module._ivalue()).has_value());
}

TEST(LinearMap, CopiesOfAModuleShareItsPackedWeights) {
  const auto module = make_packed_module(packed_int8(at::randn({9, 6})), kOp);
  const auto copy = clone_module(module);
  EXPECT_EQ(copy.attr("packed").toObject().get(), module.attr("packed").toObject().get());
}

}  // namespace
}  // namespace torchgraft
