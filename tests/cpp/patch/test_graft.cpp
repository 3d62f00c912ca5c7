#include "encoder.h"

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/graph/whole_graphs.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/serialization/import.h>

#include <sstream>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;

AdapterSpec fresh(const std::string& name, const std::string& config) {
  return {name, config_from_name(config), std::nullopt, ""};
}

at::Tensor run(torch::jit::Module& module, const at::Tensor& x) {
  at::NoGradGuard no_grad;
  return module.forward({x}).toTensor();
}

TEST(Graft, MamFusesParallelBottlenecksWithTheLinearMapsBesideThem) {
  const auto module = graft(encoder(), {fresh("task", "mam")});
  const auto whole = whole_graph(module, "grafted_forward");
  const auto& graph = *whole;
  EXPECT_EQ(testing::count_kind(graph, "torchgraft::gated_bottleneck_linear"), 2u);
  EXPECT_EQ(testing::count_kind(graph, "torchgraft::gated_bottleneck"), 0u);
}

TEST(Graft, UnipeltInsertsOneOpPerSite) {
  const auto module = graft(encoder(), {fresh("task", "unipelt")});
  const auto whole = whole_graph(module, "grafted_forward");
  const auto& graph = *whole;
  EXPECT_EQ(testing::count_kind(graph, "torchgraft::gated_lora_linear"), 4u);
  EXPECT_EQ(testing::count_kind(graph, "torchgraft::gated_prefix_attention"), 2u);
  EXPECT_EQ(testing::count_kind(graph, "torchgraft::gated_bottleneck"), 2u);
  EXPECT_EQ(testing::count_kind(graph, "aten::scaled_dot_product_attention"), 0u);
  EXPECT_EQ(module.attr("adapters")
                .toModule()
                .attr("layer_1")
                .toModule()
                .attr("selfattn_lora_v")
                .toModule()
                .attr("lora_a")
                .toTensor()
                .sizes(),
            (std::vector<int64_t>{1, 8, 12}));
}

TEST(Graft, FreshLoraGivesTheBasesResultAndDeactivatedItsBits) {
  auto base = encoder();
  auto module = graft(base, {fresh("task", "lora")});
  const at::Tensor x = at::randn({2, 5, 12});
  const at::Tensor expected = run(base, x);
  EXPECT_LT(largest_difference(run(module, x), expected), 1e-5);
  module.get_method("deactivate")({});
  EXPECT_TRUE(at::equal(run(module, x), expected));
}

TEST(Graft, TorchScriptMethodsAloneServeAMixedBatch) {
  auto module = graft(encoder(), {fresh("a", "unipelt"), fresh("b", "mam")});
  EXPECT_EQ(module.get_method("adapter_names")({}).toListRef().size(), 2u);
  EXPECT_EQ(module.get_method("active_adapter")({}).toStringRef(), "b");
  module.get_method("activate")({"a"});
  const at::Tensor x = at::randn({3, 5, 12});
  const at::Tensor ids = at::tensor({0, -1, 1}, at::kLong);
  const auto result = module.get_method("forward_with_gates")({x, c10::IValue(), ids}).toTuple();
  const auto gates = result->elements()[1].toGenericDict();
  EXPECT_EQ(gates.size(), 2u);
  const auto layer = gates.at("a").toGenericDict().at(0).toGenericDict();
  EXPECT_EQ(layer.at("selfattn_lora").toTensor().sizes(), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(layer.at("self_prefix").toTensor().sizes(), (std::vector<int64_t>{1, 1}));
}

TEST(Graft, ASavedAndLoadedModuleGivesTheSameBits) {
  auto module = graft(encoder(), {fresh("task", "unipelt")});
  std::stringstream file;
  module.save(file);
  auto loaded = torch::jit::load(file);
  const at::Tensor x = at::randn({2, 5, 12});
  EXPECT_TRUE(at::equal(run(module, x), run(loaded, x)));
}

TEST(Graft, ASecondGraftKeepsTheResultOfTheFirst) {
  auto first = graft(encoder(), {fresh("a", "unipelt")});
  auto second = graft(first, {fresh("b", "mam")});
  second.get_method("activate")({"a"});
  const at::Tensor x = at::randn({2, 5, 12});
  EXPECT_LT(largest_difference(run(first, x), run(second, x)), 1e-5);
}

TEST(Graft, OtherMethodsOfTheModuleKeepCallingForward) {
  at::NoGradGuard no_grad;  // as in run(): with autograd a projection and its LoRA are two kernels, and round otherwise
  auto base = encoder();
  base.define("def encode(self, x: Tensor) -> Tensor:\n    return self.forward(x).mean(1)\n");
  auto module = graft(base, {fresh("task", "prefix_tuning")});
  const at::Tensor x = at::randn({2, 5, 12});
  EXPECT_TRUE(at::equal(module.get_method("encode")({x}).toTensor(), run(module, x).mean(1)));
  auto again = graft(module, {fresh("other", "lora")});
  EXPECT_TRUE(at::equal(again.get_method("encode")({x}).toTensor(), run(again, x).mean(1)));
}

TEST(Graft, WhatCannotBeGraftedIsNamed) {
  const auto base = encoder();
  EXPECT_NE(error_of([&] { graft(base, {}); }).find("no adapter was given"), std::string::npos);
  EXPECT_NE(error_of([&] {
              LoRAConfig config;
              config.dtype = "int8";
              graft(base, {{"task", {{config}}, std::nullopt, ""}});
            }).find("LoRAConfig.dtype=int8 is not supported yet"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              graft(graft(base, {fresh("t", "lora")}), {fresh("t", "mam")});
            }).find("already has an adapter 't'"),
            std::string::npos);
  const auto plain = testing::make_module(
      {{"w", at::randn({4, 4})}}, "def forward(self, x: Tensor) -> Tensor:\n    return torch.linear(x, self.w)\n");
  EXPECT_NE(error_of([&] { graft(plain, {fresh("task", "mam")}); }).find("no attention was found"), std::string::npos);
  auto taken = encoder();
  taken.register_attribute("adapters", c10::IntType::get(), 1);
  EXPECT_NE(error_of([&] { graft(taken, {fresh("task", "mam")}); }).find("an attribute 'adapters' of its own"),
            std::string::npos);
}

TEST(Graft, AMissingFeedForwardBlockIsNamedWithItsLayersAndTheRemedy) {
  const auto attention_only = testing::make_module({{"w", at::randn({12, 12})}}, R"python(
def forward(self, x: Tensor) -> Tensor:
    q = torch.linear(x, self.w).view(x.size(0), x.size(1), 3, 4).transpose(1, 2)
    return torch.scaled_dot_product_attention(q, q, q)
)python");
  const std::string error = error_of([&] { graft(attention_only, {fresh("task", "seq_bn")}); });
  EXPECT_NE(error.find("the model has no output_adapter in layers 0"), std::string::npos) << error;
  EXPECT_NE(error.find("leave_out"), std::string::npos) << error;
}

}  // namespace
}  // namespace torchgraft
