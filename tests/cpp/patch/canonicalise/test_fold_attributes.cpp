#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/testing/file_check.h>

namespace torchgraft {
namespace {

torch::jit::Module module_with_attributes() {
  torch::jit::Module module("Attributes");
  module.register_attribute("training", c10::BoolType::get(), true);
  module.register_attribute("norm_first", c10::BoolType::get(), false);
  module.register_attribute("calls", c10::IntType::get(), 0);
  module.define(R"python(
def count(self) -> None:
    self.calls = self.calls + 1

def forward(self, x: Tensor) -> Tensor:
    if self.norm_first:
        x = torch.relu(x)
    else:
        x = torch.tanh(x)
    x = torch.dropout(x, 0.5, self.training)
    return x * self.calls
)python");
  return module;
}

TEST(FoldAttributes, BranchesOnPlainAttributesFoldAway) {
  const auto module = module_with_attributes();
  const auto graph = module.get_method("forward").graph()->copy();
  fold_attributes(graph, module);
  torch::jit::testing::FileCheck().check("aten::tanh")->check_not("prim::If")->check_not("aten::relu")->run(*graph);
}

TEST(FoldAttributes, TrainingAndAssignedAttributesStay) {
  const auto module = module_with_attributes();
  const auto graph = module.get_method("forward").graph()->copy();
  fold_attributes(graph, module);
  torch::jit::testing::FileCheck()
      .check_count("prim::GetAttr[name=\"training\"]", 1, /*exactly=*/true)
      ->check_count("prim::GetAttr[name=\"calls\"]", 1, /*exactly=*/true)
      ->run(*graph);
}

TEST(FoldAttributes, SaysWhatItFolded) {
  const auto module = module_with_attributes();
  const auto folded = fold_attributes(module.get_method("forward").graph()->copy(), module);
  ASSERT_EQ(folded.size(), 1);
  EXPECT_EQ(folded[0].path, "norm_first");
  EXPECT_FALSE(folded[0].value.toBool());
}

torch::jit::Module module_with_layer_drop(bool training) {
  torch::jit::Module module("LayerDrop");
  module.register_attribute("training", c10::BoolType::get(), training);
  module.define(R"python(
def forward(self, x: Tensor, keep: bool) -> Tensor:
    if not self.training or keep:
        x = torch.softmax(x, -1)
    return torch.dropout(x, 0.5, self.training)
)python");
  return module;
}

TEST(FoldTraining, ALayerThatTrainingDropsRunsInEvalMode) {
  const auto module = module_with_layer_drop(false);
  const auto graph = module.get_method("forward").graph()->copy();
  const auto folded = fold_training(graph, module);
  ASSERT_EQ(folded.size(), 1);
  EXPECT_EQ(folded[0].path, "training");
  torch::jit::testing::FileCheck().check_not("prim::If")->check("aten::softmax")->run(*graph);
}

TEST(FoldTraining, InTrainingModeNothingIsKnown) {
  const auto module = module_with_layer_drop(true);
  const auto graph = module.get_method("forward").graph()->copy();
  EXPECT_TRUE(fold_training(graph, module).empty());
  torch::jit::testing::FileCheck().check("prim::If")->run(*graph);
}

TEST(FoldTraining, DropoutAloneKeepsItsAttribute) {
  auto module = module_with_attributes();
  module.setattr("training", false);
  EXPECT_TRUE(fold_training(module.get_method("forward").graph()->copy(), module).empty());
}

// nn.TransformerEncoderLayer asks so before it decides on its fused kernel.
TEST(Simplify, QuestionsThatNobodyReadsAreDroppedWithWhatLeadsToThem) {
  torch::jit::Module module("Asks");
  module.define(R"python(
def forward(self, x: Tensor, fast: bool) -> Tensor:
    why = ""
    if fast:
        why = "device" if x.is_cuda else why
        if torch.is_grad_enabled():
            why = "grad"
        if torch.is_autocast_enabled():
            why = "autocast"
    if torch.is_grad_enabled():
        return torch.relu(x)
    return torch.tanh(x)
)python");
  const auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  torch::jit::testing::FileCheck()
      .check_count("aten::is_grad_enabled", 1, /*exactly=*/true)
      ->check_not("aten::is_autocast_enabled")
      ->check_count("prim::If", 1, /*exactly=*/true)
      ->run(*graph);
}

TEST(Simplify, ABranchThatYieldsOneValueOnBothSidesGoes) {
  torch::jit::Module module("Yields");
  module.define(R"python(
def same(self, x: Tensor, mask: Optional[Tensor], flag: bool) -> Tuple[Tensor, Optional[Tensor]]:
    kept = mask
    if flag:
        if mask is not None:
            kept = mask
    return x, kept

def other(self, x: Tensor, mask: Optional[Tensor], flag: bool) -> Tuple[Tensor, Optional[Tensor]]:
    kept = mask
    if flag:
        kept = x
    return x, kept
)python");
  const auto same = module.get_method("same").graph()->copy();
  simplify(same);
  torch::jit::testing::FileCheck().check_not("prim::If")->run(*same);
  const auto other = module.get_method("other").graph()->copy();
  simplify(other);
  torch::jit::testing::FileCheck().check("prim::If")->run(*other);
}

}  // namespace
}  // namespace torchgraft
