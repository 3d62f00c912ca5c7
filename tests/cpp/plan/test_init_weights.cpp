#include "structures.h"

#include <torchgraft/plan/adapter_weights.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::bert_like;

AdapterWeights weights_of(const MethodConfig& method, const at::TensorOptions& options = at::kFloat) {
  return init_weights(make_plan(bert_like(2), AdapterConfig{{method}}), options);
}

TEST(InitWeights, LoraStartsAsTheIdentity) {
  LoRAConfig config;
  config.r = 6;
  config.alpha = 3;
  const ModuleWeights weights = weights_of(config).at(0);
  EXPECT_EQ(weights.at("lora_a").sizes(), (std::vector<int64_t>{6, 12}));
  EXPECT_GT(weights.at("lora_a").abs().max().item<double>(), 0.1);
  EXPECT_LE(weights.at("lora_a").abs().max().item<double>(), 1 / std::sqrt(12.0));
  EXPECT_EQ(weights.at("lora_b").abs().max().item<double>(), 0);
  EXPECT_DOUBLE_EQ(weights.at("scaling").item<double>(), 0.5);
  EXPECT_EQ(weights.count("gate_weight"), 0u);
}

// A seed gives what it always gave: within a layer prefixes are drawn first, although projections run before them.
TEST(InitWeights, PrefixesAreDrawnBeforeTheLorasOfTheirLayer) {
  const AdapterConfig config{{PrefixTuningConfig(), LoRAConfig()}};
  Reparametrisation sources;
  at::manual_seed(7);
  init_weights(make_plan(bert_like(1), config), at::kFloat, &sources);
  at::manual_seed(7);
  EXPECT_TRUE(at::equal(sources.at("self_prefix").at("embeddings"), at::randn({30, 12})));
}

TEST(InitWeights, AGateReplacesTheScaling) {
  LoRAConfig config;
  config.alpha = 2;
  config.use_gating = true;
  const ModuleWeights weights = weights_of(config).at(0);
  EXPECT_EQ(weights.at("scaling").item<double>(), 1);
  EXPECT_EQ(weights.at("gate_weight").sizes(), (std::vector<int64_t>{1, 12}));
}

TEST(InitWeights, ParallelBottleneckStartsAsTheIdentity) {
  const ModuleWeights weights = weights_of(par_bn_config()).at(0);
  EXPECT_EQ(weights.at("down_weight").sizes(), (std::vector<int64_t>{6, 12}));
  EXPECT_EQ(weights.at("up_weight").abs().max().item<double>(), 0);
  EXPECT_EQ(weights.at("scaling").item<double>(), 4);
}

TEST(InitWeights, PrefixesDifferByLayerAndHaveTheHeadsShape) {
  PrefixTuningConfig config;
  config.prefix_length = 5;
  config.use_gating = true;
  config.shared_gating = false;
  const AdapterWeights weights = weights_of(config);
  ASSERT_EQ(weights.size(), 2u);
  EXPECT_EQ(weights[0].at("prefix_key").sizes(), (std::vector<int64_t>{3, 5, 4}));
  EXPECT_FALSE(at::allclose(weights[0].at("prefix_key"), weights[1].at("prefix_key")));
  EXPECT_FALSE(at::allclose(weights[0].at("prefix_key"), weights[0].at("prefix_value")));
  EXPECT_EQ(weights[0].at("gate_bias").sizes(), (std::vector<int64_t>{2}));
}

TEST(InitWeights, ASeedStartsEveryModuleAnew) {
  BnConfig config = seq_bn_config();
  config.reduction_factor = 2.0;
  config.init_weights_seed = 7;
  const AdapterWeights weights = weights_of(config);
  EXPECT_TRUE(at::equal(weights[0].at("down_weight"), weights[1].at("down_weight")));
  config.init_weights_seed.reset();
  const AdapterWeights unseeded = weights_of(config);
  EXPECT_FALSE(at::equal(unseeded[0].at("down_weight"), unseeded[1].at("down_weight")));
}

TEST(InitWeights, TakesDtypeAndStatistics) {
  BnConfig config = seq_bn_config();
  config.reduction_factor = 0.01;  // an up-projection: enough numbers to measure
  EXPECT_NEAR(weights_of(config, at::kDouble).at(0).at("down_weight").std().item<double>(), 0.02, 0.001);
  EXPECT_EQ(weights_of(config, at::kBFloat16).at(0).at("up_bias").scalar_type(), at::kBFloat16);
  config.init_weights = "houlsby";
  const at::Tensor truncated = weights_of(config).at(0).at("down_weight");
  EXPECT_LE(truncated.abs().max().item<double>(), 0.02);
  EXPECT_NEAR(truncated.std().item<double>(), 0.0088, 0.0005);
}

}  // namespace
}  // namespace torchgraft
