#include "support.h"

#include <torchgraft/patch/canonicalise/decompose_fused_encoder.h>
#include <torchgraft/patch/canonicalise/fold_attributes.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;

constexpr int64_t kHidden = 16;
constexpr int64_t kInner = 24;

// A module with the parameters of one encoder layer, by the names that the sources below use.
torch::jit::Module encoder_module(const std::string& source) {
  at::manual_seed(0);
  std::vector<std::pair<std::string, at::Tensor>> parameters = {
      {"qkv", at::randn({3 * kHidden, kHidden})}, {"qkv_b", at::randn({3 * kHidden})},
      {"o", at::randn({kHidden, kHidden})},       {"o_b", at::randn({kHidden})},
      {"g1", at::rand({kHidden}) + 0.5},          {"b1", at::randn({kHidden})},
      {"g2", at::rand({kHidden}) + 0.5},          {"b2", at::randn({kHidden})},
      {"w1", at::randn({kInner, kHidden})},       {"c1", at::randn({kInner})},
      {"w2", at::randn({kHidden, kInner})},       {"c2", at::randn({kHidden})}};
  for (auto& [name, tensor] : parameters) {
    tensor = name.size() == 2 || name.back() == 'b' || tensor.dim() == 2 ? tensor * 0.4 : tensor;
  }
  return testing::make_module(parameters, source);
}

std::string fused_call(const std::string& x, bool gelu, bool norm_first, const std::string& mask) {
  return "torch._transformer_encoder_layer_fwd(" + x + ", 16, 4, self.qkv, self.qkv_b, self.o, self.o_b, " +
         (gelu ? "True" : "False") + ", " + (norm_first ? "True" : "False") +
         ", 1e-5, self.g1, self.b1, self.g2, self.b2, self.w1, self.c1, self.w2, self.c2, " + mask + ")";
}

void expect_decomposed(const torch::jit::Module& module, std::vector<c10::IValue> inputs) {
  at::NoGradGuard no_grad;
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  decompose_fused_encoder(graph);
  graph->lint();
  EXPECT_EQ(count_kind(*graph, "aten::_transformer_encoder_layer_fwd"), 0u);
  EXPECT_EQ(count_kind(*graph, "aten::_nested_tensor_from_mask"), 0u);
  EXPECT_GE(count_kind(*graph, "aten::scaled_dot_product_attention"), 1u);
  auto original = module.clone();
  const at::Tensor expected = original.forward(inputs).toTensor();
  EXPECT_LT(largest_difference(expected, testing::run_graph(module, graph, inputs).toTensor()), 1e-5);
}

TEST(DecomposeFusedEncoder, AFusedLayerInAStraightLineComputesTheSame) {
  for (const bool norm_first : {false, true}) {
    for (const bool gelu : {false, true}) {
      const auto module = encoder_module("def forward(self, x: Tensor) -> Tensor:\n    return " +
                                         fused_call("x", gelu, norm_first, "None, None") + "\n");
      expect_decomposed(module, {at::randn({2, 5, kHidden})});
    }
  }
}

TEST(DecomposeFusedEncoder, AFusedLayerWithAPaddingMaskComputesTheSame) {
  const auto module = encoder_module("def forward(self, x: Tensor, padding: Tensor) -> Tensor:\n    return " +
                                     fused_call("x", true, false, "padding, 1") + "\n");
  at::Tensor padding = at::zeros({2, 5}, at::kBool);
  padding[1].slice(0, 3).fill_(true);
  expect_decomposed(module, {at::randn({2, 5, kHidden}), padding});
}

TEST(DecomposeFusedEncoder, NestedTensorsBecomeDenseWithTheirMaskAndTheirZeros) {
  const auto module = encoder_module(
      "def forward(self, x: Tensor, padding: Tensor) -> Tensor:\n"
      "    nested = torch._nested_tensor_from_mask(x, torch.logical_not(padding), False)\n"
      "    y = " +
      fused_call("nested", false, false, "None, None") +
      "\n"
      "    y = " +
      fused_call("y", false, false, "None, None") +
      "\n"
      "    return torch.to_padded_tensor(y, 0.0, x.size())\n");
  at::Tensor padding = at::zeros({2, 5}, at::kBool);
  padding[1].slice(0, 3).fill_(true);
  expect_decomposed(module, {at::randn({2, 5, kHidden}), padding});
}

TEST(DecomposeFusedEncoder, ABranchWithAFusedLayerTakesItsOtherSide) {
  const auto module = encoder_module(
      "def forward(self, x: Tensor) -> Tensor:\n"
      "    if x.requires_grad:\n"
      "        y = torch.linear(x, self.o)\n"
      "    else:\n"
      "        y = " +
      fused_call("x", true, false, "None, None") +
      "\n"
      "    return y\n");
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  decompose_fused_encoder(graph);
  EXPECT_EQ(count_kind(*graph, "prim::If"), 0u);
  const at::Tensor x = at::randn({2, 5, kHidden});
  EXPECT_TRUE(
      at::allclose(testing::run_graph(module, graph, {x}).toTensor(), at::linear(x, module.attr("o").toTensor())));
}

}  // namespace
}  // namespace torchgraft
