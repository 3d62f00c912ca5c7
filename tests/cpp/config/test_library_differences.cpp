#include <torchgraft/config/library_differences.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/config_string.h>
#include <torchgraft/config/named_configs.h>

#include <gtest/gtest.h>

#include <string>

namespace torchgraft {
namespace {

LibraryDifference of(const std::string& model, const std::string& method) {
  const std::string config = config_to_json(config_from_string(method));
  return library_difference(R"({"name": "task", "model_type": ")" + model + R"(", "config": )" + config + "}");
}

std::string wiring(const std::string& model, const std::string& method) {
  return library_wiring(model, config_from_name(method));
}

TEST(LibraryDifferences, OnlyWhatDiffersIsRefused) {
  EXPECT_EQ(of("albert", "double_seq_bn").refused, "");
  EXPECT_EQ(of("gptj", "par_bn").refused, "");
  EXPECT_NE(of("mt5", "prefix_tuning").refused.find("on T5"), std::string::npos);
  EXPECT_EQ(of("t5", "lora").refused, "");
}

TEST(LibraryDifferences, InAWholeClipWhatNamesLayersIsMarked) {
  for (const char* method : {"prefix_tuning", "mam", "lora[leave_out=[1]]", "seq_bn[leave_out=[0]]",
                             "seq_bn[reduction_factor={'0': 4, 'default': 16}]", "loreft[layers=[1]]"}) {
    EXPECT_EQ(library_wiring("clip", config_from_string(method)), "clip") << method;
    EXPECT_EQ(library_wiring("clip_text_model", config_from_string(method)), "") << method;
    EXPECT_EQ(of("clip", method).refused, "") << method;
  }
  EXPECT_EQ(wiring("clip", "lora") + wiring("clip", "double_seq_bn"), "");
}

TEST(LibraryDifferences, OnlyBottlenecksThatAreWiredOtherwiseAreMarked) {
  EXPECT_EQ(wiring("albert", "double_seq_bn"), "albert");
  EXPECT_EQ(wiring("albert", "seq_bn"), "");
  EXPECT_EQ(wiring("bert", "double_seq_bn"), "");
  EXPECT_EQ(wiring("gptj", "mam"), "gptj");
  EXPECT_EQ(wiring("gptj", "lora"), "");
}

TEST(LibraryDifferences, PrefixesMayMovePositionsButOnDeBERTa) {
  const auto read = [](const std::string& model, const std::string& method) {
    const std::string inner = config_to_json(config_from_name(method));
    return config_from_json(R"({"model_type": ")" + model + R"(", "config": )" + inner + "}").may_move_positions;
  };
  EXPECT_TRUE(read("bert", "mam"));
  EXPECT_FALSE(read("bert", "lora"));
  EXPECT_FALSE(read("deberta-v2", "mam"));
  EXPECT_FALSE(config_from_name("mam").may_move_positions);
}

TEST(LibraryDifferences, AMarkSurvivesJson) {
  const std::string inner = config_to_json(config_from_name("double_seq_bn"));
  const AdapterConfig read = config_from_json(R"({"name": "a", "model_type": "albert", "config": )" + inner + "}");
  EXPECT_EQ(read.wired_for, "albert");
  EXPECT_EQ(config_from_json(config_to_json(read)).wired_for, "albert");
  EXPECT_EQ(config_from_json(inner).wired_for, "");
}

TEST(LibraryDifferences, WhatTheDirectoryDoesNotSayIsWarnedOf) {
  EXPECT_NE(of("distilbert", "unipelt").warned.find("adds 1"), std::string::npos);
  for (const char* model : {"bart", "mbart", "plbart", "whisper", "gpt2", "llama", "mistral", "encoder-decoder"}) {
    EXPECT_NE(of(model, "mam").warned.find("first tokens"), std::string::npos) << model;
    EXPECT_EQ(of(model, "lora").warned, "") << model;
  }
  EXPECT_EQ(of("bert", "mam").warned, "");
  EXPECT_NE(of("deberta", "lora").warned.find("random bias"), std::string::npos);
  EXPECT_EQ(of("distilbert", "lora").warned, "");
  EXPECT_NE(of("deberta", "seq_bn").warned.find("random bias"), std::string::npos);
}

TEST(LibraryDifferences, AllThatIsNotKnownIsSaid) {
  const std::string union_config = R"({"architecture": "union", "configs": [)" +
                                   config_to_json(config_from_name("prefix_tuning")) + ", " +
                                   config_to_json(config_from_name("noreft")) + "]}";
  const LibraryDifference both =
      library_difference(R"({"name": "task", "model_type": "gpt2", "config": )" + union_config + "}");
  EXPECT_NE(both.warned.find("first tokens"), std::string::npos);
  EXPECT_NE(both.warned.find("DiReFT"), std::string::npos);
  const LibraryDifference nameless = library_difference(
      R"({"config": {"architecture": "reft", "orthogonality": false}})");  // whoever wrote it, it may be a DiReFT
  EXPECT_NE(nameless.warned.find("DiReFT"), std::string::npos);
}

TEST(LibraryDifferences, InversesAreThereMissingOrNotKnown) {
  const std::string inner = config_to_json(config_from_name("seq_bn_inv"));
  const auto read = [&](const std::string& model_class, const std::string& model = "bert") {
    return config_from_json(R"({"model_type": ")" + model + R"(", "model_class": )" + model_class + R"(, "config": )" +
                            inner + "}");
  };
  for (const char* name : {"\"BertAdapterModel\"", "\"BertModelWithHeads\""}) {
    EXPECT_TRUE(read(name).inverts_output && read(name).inverts_output_is_known) << name;
  }
  for (const char* name : {"\"BertForMaskedLM\"", "\"GPT2LMHeadModel\""}) {
    EXPECT_FALSE(read(name).inverts_output) << name;
    EXPECT_TRUE(read(name).inverts_output_is_known) << name;
  }
  for (const char* name : {"\"BertModel\"", "null", "\"OfTomorrow\""}) {
    const AdapterConfig config = read(name);
    EXPECT_FALSE(config.inverts_output || config.inverts_output_is_known) << name;
    EXPECT_FALSE(config_from_json(config_to_json(config)).inverts_output_is_known) << name;
    EXPECT_TRUE(read(name, "qwen2").inverts_output_is_known) << name;
  }
  const AdapterConfig said = config_from_json(
      R"({"model_type": "bert", "model_class": "BertModel", "inverts_output": true, "config": )" + inner + "}");
  EXPECT_TRUE(said.inverts_output && said.inverts_output_is_known);
}

TEST(LibraryDifferences, WithoutModelTypeNothingIsSaid) {
  const std::string config = config_to_json(config_from_name("double_seq_bn"));
  for (const std::string& text : {config, R"({"model_type": null, "config": )" + config + "}"}) {
    EXPECT_EQ(library_difference(text).refused, "");
    EXPECT_EQ(library_difference(text).warned, "");
  }
}

}  // namespace
}  // namespace torchgraft
