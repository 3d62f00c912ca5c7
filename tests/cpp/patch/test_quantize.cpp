#include "encoder.h"

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/quantize.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/serialization/import.h>

#include <sstream>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;

torch::jit::Module loaded(const torch::jit::Module& module) {
  std::stringstream file;
  module.save(file);
  return torch::jit::load(file);
}

// Bound of |int8 product - product| for each element: half a step of the weight's row, and of the activations, whose
// 7 bits torch's kernels use, each times what it is multiplied by.
at::Tensor bound(const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor weight_step = weight.abs().amax({1}, /*keepdim=*/true) / 127.5;
  const double range = std::max(0.0, x.max().item<double>()) - std::min(0.0, x.min().item<double>());
  const double x_step = range / 127;
  const at::Tensor rounded = (weight.abs() + weight_step) * x_step;  // the zero point is rounded, too
  return at::linear(x.abs(), weight_step.expand_as(weight)) + at::linear(at::ones_like(x), rounded);
}

TEST(Quantize, OneProductIsWithinItsSteps) {
  at::manual_seed(2);
  const at::Tensor weight = at::randn({9, 12});
  const auto module = testing::make_module({{"w", weight}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.w)
)");
  const Quantized made = quantize(module);
  ASSERT_EQ(made.maps.size(), 1u);
  EXPECT_EQ(made.maps[0].path, "w");
  EXPECT_EQ(made.maps[0].roles, std::vector<std::string>{"other"});
  EXPECT_EQ(made.maps[0].out_features, 9);
  EXPECT_EQ(made.maps[0].in_features, 12);
  EXPECT_EQ(made.maps[0].kept, "");
  EXPECT_FALSE(made.module.hasattr("w"));
  EXPECT_TRUE(made.module.hasattr("w_packed_params"));
  torch::jit::Module read = loaded(made.module);
  const at::Tensor x = at::randn({3, 5, 12});
  const at::Tensor exact = at::linear(x, weight);
  const at::Tensor actual = read.forward({x}).toTensor();
  EXPECT_TRUE((actual - exact).abs().le(bound(x, weight)).all().item<bool>());
  EXPECT_GT(largest_difference(actual, exact), 1e-4);
}

TEST(Quantize, AGraftedModuleRunsAfterSavingAndLoading) {
  const auto base = encoder();
  const auto grafted = graft(base, {AdapterSpec{"task", config_from_name("unipelt"), std::nullopt, ""}});
  torch::jit::Module made = loaded(quantize(grafted).module);
  const at::Tensor x = at::randn({3, 5, testing::kHidden});
  at::NoGradGuard no_grad;
  torch::jit::Module in_float = grafted;
  const at::Tensor expected = in_float.forward({x}).toTensor();
  const at::Tensor difference = made.forward({x}).toTensor() - expected;
  EXPECT_LT(difference.norm().item<double>(), 0.1 * expected.norm().item<double>());
  EXPECT_GT(difference.norm().item<double>(), 1e-4);
  made.get_method("deactivate")({});
  torch::jit::Module bare = loaded(quantize(base).module);
  EXPECT_TRUE(at::equal(made.forward({x}).toTensor(), bare.forward({x}).toTensor()));
}

TEST(Quantize, TheProbeMeasuresEachMap) {
  const auto base = encoder();
  Quantized probe = quantization_probe(base, {{"query"}});
  EXPECT_EQ(probe.maps.size(), 10u);
  const auto errors = probe.module.forward({at::randn({3, 5, testing::kHidden}), c10::IValue()}).toTensorList();
  ASSERT_EQ(errors.size(), probe.maps.size());
  for (const at::Tensor error : errors) {
    EXPECT_GT(error.item<double>(), 1e-4);
    EXPECT_LT(error.item<double>(), 0.1);
  }
}

TEST(Quantize, AttributesThatForwardAssignsAreRefused) {
  torch::jit::Module module = testing::make_module({{"w", at::randn({4, 4})}}, "");
  module.register_attribute("count", c10::IntType::get(), 0);
  module.define(R"(
def forward(self, x: Tensor) -> Tensor:
    self.count = self.count + 1
    return torch.linear(x, self.w)
)");
  EXPECT_NE(error_of([&] { quantize(module); }).find("quantize: forward assigns an attribute, count"),
            std::string::npos);
}

TEST(Quantize, NamesThatSkipDoesNotKnowAreRefused) {
  EXPECT_NE(error_of([] { quantize(encoder(), {{"layer7"}}); }).find("skip names 'layer7'"), std::string::npos);
  EXPECT_EQ(quantize(encoder(), {{"layer0"}}).maps.front().kept, "skip names it");
}

}  // namespace
}  // namespace torchgraft
