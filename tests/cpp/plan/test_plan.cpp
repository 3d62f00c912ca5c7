#include "structures.h"
#include "support.h"

#include <torchgraft/plan/plan.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::bert_like;
using testing::error_of;

std::vector<std::string> slots(const Plan& plan) {
  std::vector<std::string> result;
  for (const PlannedModule& module : plan) {
    result.push_back(std::to_string(module.layer) + ":" + module.slot);
  }
  return result;
}

TEST(Plan, UnipeltInExecutionOrder) {
  EXPECT_EQ(slots(make_plan(bert_like(2), config_from_name("unipelt"))),
            (std::vector<std::string>{"0:self_prefix", "0:selfattn_lora_q", "0:selfattn_lora_v", "0:output_adapter",
                                      "1:self_prefix", "1:selfattn_lora_q", "1:selfattn_lora_v", "1:output_adapter"}));
}

TEST(Plan, LeaveOutAndReductionFactorByLayer) {
  BnConfig config = seq_bn_config();
  config.leave_out = {1};
  config.reduction_factor = std::map<std::string, double>{{"0", 4}, {"default", 100}};
  const Plan plan = make_plan(bert_like(3), AdapterConfig{{config}});
  ASSERT_EQ(slots(plan), (std::vector<std::string>{"0:output_adapter", "2:output_adapter"}));
  EXPECT_EQ(std::get<PlannedBottleneck>(plan[0].method).bottleneck_size, 3);
  EXPECT_EQ(std::get<PlannedBottleneck>(plan[1].method).bottleneck_size, 1);  // never 0
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
  ASSERT_EQ(slots(plan), (std::vector<std::string>{"0:intermediate_lora", "0:output_lora"}));
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
  LoRAConfig nothing;
  nothing.selfattn_lora = false;
  EXPECT_NE(error_of([&] { make_plan(bert_like(1), AdapterConfig{{nothing}}); }).find("asks for nothing"),
            std::string::npos);
  EXPECT_NE(error_of([&] { make_plan(Structure{}, config_from_name("mam")); }).find("no attention layer"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
