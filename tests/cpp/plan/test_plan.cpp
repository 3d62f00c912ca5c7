#include "structures.h"
#include "support.h"

#include <torchgraft/plan/plan.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::bart_like;
using testing::bert_like;
using testing::error_of;

std::vector<std::string> sites(const Plan& plan) {
  std::vector<std::string> result;
  for (const PlannedModule& module : plan) {
    result.push_back(std::to_string(module.layer) + ":" + module.site);
  }
  return result;
}

TEST(Plan, UnipeltInExecutionOrder) {
  EXPECT_EQ(sites(make_plan(bert_like(2), config_from_name("unipelt"))),
            (std::vector<std::string>{"0:selfattn_lora_q", "0:selfattn_lora_v", "0:self_prefix", "0:output_adapter",
                                      "1:selfattn_lora_q", "1:selfattn_lora_v", "1:self_prefix", "1:output_adapter"}));
}

TEST(Plan, LeaveOutAndReductionFactorByLayer) {
  BnConfig config = seq_bn_config();
  config.leave_out = {1};
  config.reduction_factor = std::map<std::string, double>{{"0", 4}, {"default", 100}};
  const Plan plan = make_plan(bert_like(3), AdapterConfig{{config}});
  ASSERT_EQ(sites(plan), (std::vector<std::string>{"0:output_adapter", "2:output_adapter"}));
  EXPECT_EQ(std::get<PlannedBottleneck>(plan[0].method).bottleneck_size, 3);
  EXPECT_EQ(std::get<PlannedBottleneck>(plan[1].method).bottleneck_size, 1);  // never 0
}

// Python: 48 // 0.1 == 479, because 0.1 is a little more than a tenth.
TEST(Plan, BottleneckSizesAreFloorDivisionsOfPython) {
  const std::vector<std::pair<double, int64_t>> cases = {{0.1, 119}, {0.3, 40}, {0.7, 17}, {5, 2}, {2.4, 5}, {13, 1}};
  for (const auto& [factor, size] : cases) {
    BnConfig config = seq_bn_config();
    config.reduction_factor = factor;
    const Plan plan = make_plan(bert_like(1), AdapterConfig{{config}});
    EXPECT_EQ(std::get<PlannedBottleneck>(plan.at(0).method).bottleneck_size, size) << factor;
  }
}

TEST(Plan, ABottleneckThatNoMemoryHoldsIsRefused) {
  for (const double factor : {1e-300, 1e-12}) {
    BnConfig config = seq_bn_config();
    config.reduction_factor = factor;
    const std::string error = error_of([&] { make_plan(bert_like(1), AdapterConfig{{config}}); });
    EXPECT_NE(error.find("give a larger reduction_factor"), std::string::npos) << error;
  }
}

// Self and cross attention share the feed-forward block of their decoder layer.
TEST(Plan, ADecoderLayerHasOneFeedForwardBlock) {
  LoRAConfig lora;
  lora.attn_matrices = {"q"};
  lora.intermediate_lora = lora.output_lora = true;
  BnConfig bottleneck = double_seq_bn_config();
  EXPECT_EQ(sites(make_plan(bart_like(1), AdapterConfig{{bottleneck, lora}})),
            (std::vector<std::string>{"0:selfattn_lora_q", "0:mh_adapter", "0:intermediate_lora", "0:output_lora",
                                      "0:output_adapter", "1:selfattn_lora_q", "1:mh_adapter", "2:crossattn_lora_q",
                                      "2:intermediate_lora", "2:output_lora", "2:output_adapter"}));
  bottleneck.cross_adapter = true;
  bottleneck.mh_adapter = bottleneck.output_adapter = false;
  EXPECT_EQ(sites(make_plan(bart_like(1), AdapterConfig{{bottleneck}})), std::vector<std::string>{"2:cross_adapter"});
  Structure none = bart_like(1);
  none.layers[2].ffn_in = none.layers[2].ffn_out = std::nullopt;
  none.layers[2].has_ffn_residual = false;
  EXPECT_NE(error_of([&] { make_plan(none, config_from_name("seq_bn")); }).find("no output_adapter in layers 1;"),
            std::string::npos);
}

TEST(Plan, PrefixesByKindOfAttention) {
  PrefixTuningConfig config;
  EXPECT_EQ(sites(make_plan(bart_like(1), AdapterConfig{{config}})),
            (std::vector<std::string>{"0:encoder_prefix", "1:self_prefix", "2:cross_prefix"}));
  config.encoder_prefix = config.cross_prefix = false;
  EXPECT_EQ(sites(make_plan(bart_like(1), AdapterConfig{{config}})), std::vector<std::string>{"1:self_prefix"});
}

TEST(Plan, PrefixesOfTheLayersThatHaveOneShareAnMlp) {
  PrefixTuningConfig config;
  config.leave_out = {0};
  const Plan plan = make_plan(bert_like(3), AdapterConfig{{config}});
  ASSERT_EQ(plan.size(), 2u);
  EXPECT_EQ(std::get<PlannedPrefix>(plan[1].method).group_index, 1);
  EXPECT_EQ(std::get<PlannedPrefix>(plan[1].method).group_size, 2);
}

TEST(Plan, LoraTakesTheSizesOfItsProjection) {
  LoRAConfig config;
  config.selfattn_lora = false;
  config.intermediate_lora = config.output_lora = true;
  const Plan plan = make_plan(bert_like(1), AdapterConfig{{config}});
  ASSERT_EQ(sites(plan), (std::vector<std::string>{"0:intermediate_lora", "0:output_lora"}));
  EXPECT_EQ(std::get<PlannedLoRA>(plan[0].method).out_features, 20);
  EXPECT_EQ(std::get<PlannedLoRA>(plan[1].method).in_features, 20);
}

TEST(Plan, AMissingPlaceIsNamedWithItsLayers) {
  Structure structure = bert_like(3);
  structure.layers[1].has_ffn_residual = structure.layers[2].has_ffn_residual = false;
  structure.layers[1].notes = {"why"};
  const std::string error = error_of([&] { make_plan(structure, config_from_name("seq_bn")); });
  EXPECT_NE(error.find("no output_adapter in layers 1, 2; add them to the config's leave_out"), std::string::npos)
      << error;
  EXPECT_NE(error.find("layer 1: why"), std::string::npos) << error;
}

TEST(Plan, Refusals) {
  BnConfig by_layer = seq_bn_config();
  by_layer.reduction_factor = std::map<std::string, double>{{"0", 4}};
  EXPECT_NE(error_of([&] { make_plan(bert_like(2), AdapterConfig{{by_layer}}); }).find("neither layer 1 nor a default"),
            std::string::npos);
  LoRAConfig first;
  first.leave_out = {0};
  EXPECT_NE(error_of([&] { make_plan(bert_like(2), config_union({first, LoRAConfig{}})); }).find("claim selfattn_lora"),
            std::string::npos);
  PrefixTuningConfig short_prefix;  // as in the library: one pool for a location
  short_prefix.prefix_length = 3;
  short_prefix.leave_out = {0};
  PrefixTuningConfig long_prefix;
  long_prefix.leave_out = {1};
  EXPECT_NE(error_of([&] {
              make_plan(bert_like(2), config_union({short_prefix, long_prefix}));
            }).find("two prefix configs of the union claim self_prefix"),
            std::string::npos);
  BnConfig compacter = seq_bn_config();
  compacter.phm_layer = true;
  compacter.leave_out = {0};
  BnConfig other = compacter;
  other.leave_out = {1};
  EXPECT_NE(error_of([&] {
              make_plan(bert_like(2), config_union({compacter, other}));
            }).find("two Compacter configs of the union share factors"),
            std::string::npos);
  Structure without_projections = bert_like(2);
  without_projections.layers[1].query = without_projections.layers[1].value = std::nullopt;
  EXPECT_NE(error_of([&] {
              make_plan(without_projections, config_from_name("lora"));
            }).find("no selfattn_lora in layers 1; add"),
            std::string::npos);
  LoRAConfig nothing;
  nothing.selfattn_lora = false;
  EXPECT_NE(error_of([&] { make_plan(bert_like(1), AdapterConfig{{nothing}}); }).find("asks for nothing"),
            std::string::npos);
  EXPECT_NE(error_of([&] { make_plan(Structure{}, config_from_name("mam")); }).find("no attention layer"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
