#include "support.h"

#include <torchgraft/patch/graph/clone_module.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::make_module;

// A module with two parts that share one weight, a buffer, and a list that forward appends to.
torch::jit::Module make_tied() {
  const at::Tensor weight = at::ones({3, 3}).requires_grad_();
  torch::jit::Module module = make_module({{"w", weight}}, "def forward(self, x: Tensor) -> Tensor:\n    return x\n");
  torch::jit::Module part = make_module({{"v", weight}}, "def forward(self, x: Tensor) -> Tensor:\n    return x\n");
  part.register_buffer("count", at::zeros({1}));
  module.register_module("part", part);
  c10::List<at::Tensor> cache({at::zeros({2})});
  module.register_attribute("cache", c10::ListType::ofTensors(), cache);
  return module;
}

TEST(CloneModule, ParametersShareMemoryAndStayTied) {
  const auto module = make_tied();
  const auto copy = clone_module(module);
  const at::Tensor original = module.attr("w").toTensor();
  const at::Tensor cloned = copy.attr("w").toTensor();
  EXPECT_EQ(cloned.data_ptr(), original.data_ptr());
  EXPECT_TRUE(cloned.requires_grad());
  EXPECT_FALSE(cloned.is_same(original));
  EXPECT_TRUE(cloned.is_same(copy.attr("part").toModule().attr("v").toTensor()));
}

TEST(CloneModule, ConvertingTheCopyLeavesTheModuleAsItIs) {
  const auto module = make_tied();
  auto copy = clone_module(module);
  copy.to(at::kDouble);
  EXPECT_EQ(copy.attr("w").toTensor().scalar_type(), at::kDouble);
  EXPECT_EQ(module.attr("w").toTensor().scalar_type(), at::kFloat);
  EXPECT_EQ(module.attr("part").toModule().attr("v").toTensor().scalar_type(), at::kFloat);
}

TEST(CloneModule, BuffersAndContainersAreCopied) {
  const auto module = make_tied();
  const auto copy = clone_module(module);
  copy.attr("part").toModule().attr("count").toTensor().add_(1);
  EXPECT_EQ(module.attr("part").toModule().attr("count").toTensor().item<float>(), 0.0f);
  copy.attr("cache").toTensorList().push_back(at::zeros({2}));
  EXPECT_EQ(module.attr("cache").toTensorList().size(), 1u);
}

TEST(CloneModule, DefiningAMethodOnTheCopyLeavesTheModuleWithoutIt) {
  const auto module = make_tied();
  auto copy = clone_module(module);
  copy.define("def twice(self, x: Tensor) -> Tensor:\n    return x * 2\n");
  EXPECT_FALSE(module.find_method("twice").has_value());
}

}  // namespace
}  // namespace torchgraft
