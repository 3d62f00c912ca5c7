#include "support.h"

#include <torchgraft/config/adapter_config.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::error_of;

std::string error_of_json(const std::string& json) {
  return error_of([&] { check_supported(config_from_json(json)); });
}

TEST(AdapterConfig, EveryNameSurvivesJson) {
  for (const std::string& name : config_names()) {
    const std::string json = config_to_json(config_from_name(name));
    EXPECT_EQ(config_to_json(config_from_json(json)), json) << name;
  }
}

TEST(AdapterConfig, UnipeltIsGatedThroughout) {
  const AdapterConfig config = config_from_name("unipelt");
  ASSERT_EQ(config.methods.size(), 3u);
  EXPECT_TRUE(std::get<PrefixTuningConfig>(config.methods[0]).use_gating);
  EXPECT_EQ(std::get<PrefixTuningConfig>(config.methods[0]).prefix_length, 10);
  EXPECT_TRUE(std::get<BnConfig>(config.methods[1]).use_gating);
  EXPECT_TRUE(std::get<LoRAConfig>(config.methods[2]).use_gating);
}

TEST(AdapterConfig, ReadsTheFileThatSaveAdapterWrites) {
  const AdapterConfig config = config_from_json(
      R"({"config": {"architecture": "lora", "r": 3, "attn_matrices": ["k"]}, "hidden_size": 32, "name": "t"})");
  const auto& lora = std::get<LoRAConfig>(config.methods.at(0));
  EXPECT_EQ(lora.r, 3);
  EXPECT_EQ(lora.attn_matrices, std::vector<std::string>{"k"});
  EXPECT_EQ(lora.alpha, 8);
  EXPECT_EQ(config_from_json(R"({"config": "mam"})").methods.size(), 2u);
}

struct BadConfig {
  std::string json;
  std::string message;
};

class Refused : public ::testing::TestWithParam<BadConfig> {};

TEST_P(Refused, NamesTheField) {
  const std::string error = error_of_json(GetParam().json);
  EXPECT_NE(error.find(GetParam().message), std::string::npos) << error;
}

INSTANTIATE_TEST_SUITE_P(
    Configs, Refused,
    ::testing::Values(
        BadConfig{"{", "config: not JSON"}, BadConfig{"[1]", "expected a JSON object"},
        BadConfig{R"({"architecture": "lora", "rank": 4})", "LoRAConfig has no field 'rank'"},
        BadConfig{R"({"architecture": "lora", "r": "8"})", "expected LoRAConfig.r to be an integer, got \"8\""},
        BadConfig{R"({"architecture": "lora", "r": 0})", "expected LoRAConfig.r to be positive"},
        BadConfig{R"({"architecture": "lora", "composition_mode": "scale", "r": 2})",
                  "composition_mode=\"scale\" ((IA)^3) needs LoRAConfig.r=1, got 2"},
        BadConfig{R"({"architecture": "lora", "composition_mode": "scale", "r": 1, "use_dora": true})",
                  "composition_mode=\"scale\" ((IA)^3) and use_dora exclude each other"},
        BadConfig{R"({"architecture": "lora", "dtype": "int8"})", "LoRAConfig.dtype=int8 is not supported yet"},
        BadConfig{R"({"architecture": "lora", "dropout": 1.0})",
                  "expected LoRAConfig.dropout to be at least 0 and below 1, got 1"},
        BadConfig{R"({"architecture": "lora", "vera_d": 0.1})",
                  "VeRA needs both LoRAConfig.vera_d and LoRAConfig.vera_b"},
        BadConfig{R"({"architecture": "lora", "attn_matrices": ["o"]})", "LoRAConfig.attn_matrices=o is not supported"},
        BadConfig{R"({"architecture": "prompt_tuning", "prompt_length": 0})",
                  "expected PromptTuningConfig.prompt_length to be from 1 to 1048576, got 0"},
        BadConfig{R"({"architecture": "prompt_tuning", "combine": "suffix"})",
                  "PromptTuningConfig.combine=suffix is not supported"},
        BadConfig{R"({"architecture": "prompt_tunings"})", "the architecture \"prompt_tunings\" is not supported"},
        BadConfig{R"({"architecture": "reft"})", "ReftConfig needs the field layers"},
        BadConfig{R"({"architecture": "reft", "layers": "some", "prefix_positions": 1, "suffix_positions": 0, "r": 1,
                      "orthogonality": false})",
                  "expected ReftConfig.layers to be \"all\" or a list of layer numbers, got \"some\""},
        BadConfig{R"({"architecture": "reft", "layers": 3, "prefix_positions": 1, "suffix_positions": 0, "r": 1,
                      "orthogonality": false})",
                  "expected ReftConfig.layers to be a string or a list, got 3"},
        BadConfig{R"({"architecture": "reft", "layers": [1], "prefix_positions": 0, "suffix_positions": 0, "r": 1,
                      "orthogonality": false})",
                  "ReftConfig has no positions: such an adapter would change nothing"},
        BadConfig{R"({"architecture": "reft", "layers": [1], "prefix_positions": -1, "suffix_positions": 3, "r": 1,
                      "orthogonality": false})",
                  "expected ReftConfig.prefix_positions to be at least 0, got -1"},
        BadConfig{R"({"architecture": "reft", "layers": [1], "prefix_positions": 1, "suffix_positions": 3, "r": 1,
                      "orthogonality": false, "non_linearity": "wave"})",
                  "ReftConfig.non_linearity=wave is not supported yet"},
        BadConfig{R"({"architecture": "prefix_tuning", "dropout": -0.5})",
                  "expected PrefixTuningConfig.dropout to be at least 0 and below 1, got -0.5"},
        BadConfig{R"({"mh_adapter": true})", "BnConfig needs the field"},
        BadConfig{R"({"mh_adapter": true, "output_adapter": true, "reduction_factor": 2, "non_linearity": "relu",
                      "stochastic_depth": 1.5})",
                  "expected BnConfig.stochastic_depth to be at least 0 and below 1, got 1.5"},
        BadConfig{R"({"mh_adapter": true, "output_adapter": true, "reduction_factor": 2, "non_linearity": "swosh"})",
                  "BnConfig.non_linearity=swosh is not supported yet"},
        BadConfig{R"({"mh_adapter": true, "output_adapter": true, "reduction_factor": 2, "non_linearity": "relu",
                      "residual_before_ln": "post_add"})",
                  "BnConfig.residual_before_ln=\"post_add\" needs original_ln_before=True"},
        BadConfig{R"({"mh_adapter": true, "output_adapter": true, "reduction_factor": 2, "non_linearity": "relu",
                      "original_ln_before": true, "residual_before_ln": "before"})",
                  "BnConfig.residual_before_ln=before is not supported yet (supported: post_add, True, False)"},
        BadConfig{R"({"mh_adapter": true, "output_adapter": true, "reduction_factor": 2, "non_linearity": "relu",
                      "original_ln_before": true, "residual_before_ln": "False"})",
                  "BnConfig.residual_before_ln=False is not supported yet (supported: post_add, True, False)"},
        BadConfig{
            R"({"mh_adapter": true, "output_adapter": true, "non_linearity": "relu",
                      "reduction_factor": {"first": 2}})",
            "expected the keys of BnConfig.reduction_factor to be layer numbers or \"default\", got \"first\""},
        BadConfig{R"({"architecture": "lora", "r": 1e30})", "expected LoRAConfig.r to be an integer, got 1e+30"},
        BadConfig{R"({"architecture": "lora", "leave_out": [9223372036854775808]})",
                  "expected LoRAConfig.leave_out[] to be an integer below 2^63, got 9223372036854775808"},
        BadConfig{R"({"architecture": "union", "configs": [{"architecture": "lora"}, {"architecture": "lora"}]})",
                  "two LoRA configs"},
        BadConfig{R"({"architecture": "union", "configs": [{"architecture": "union", "configs": []}]})",
                  "a union inside a union"}));

TEST(AdapterConfig, AnUnknownNameListsTheKnownOnes) {
  const std::string error = error_of([] { config_from_name("unipel"); });
  EXPECT_NE(error.find("no configuration is called 'unipel'; there are: compacter"), std::string::npos) << error;
}

// The oracle takes a scaling of 4.0 but not of 4, and prints a reduction factor of 2.
TEST(AdapterConfig, WritesNumbersAsTheOracleDoes) {
  const std::string json = config_to_json(config_from_name("par_bn"));
  EXPECT_NE(json.find("\"scaling\":4.0,"), std::string::npos) << json;
  EXPECT_NE(json.find("\"reduction_factor\":2,"), std::string::npos) << json;
}

TEST(AdapterConfig, TwoBottlenecksAtDifferentPlacesMayJoin) {
  BnConfig attention = seq_bn_config();
  attention.mh_adapter = true;
  attention.output_adapter = false;
  EXPECT_EQ(config_union({attention, par_bn_config()}).methods.size(), 2u);
  EXPECT_NE(error_of([&] { config_union({par_bn_config(), seq_bn_config()}); }).find("for the same locations"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
