#include <torchgraft/config/library_differences.h>

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/named_configs.h>

#include <gtest/gtest.h>

#include <string>

namespace torchgraft {
namespace {

LibraryDifference of(const std::string& model, const std::string& method) {
  const std::string config = config_to_json(config_from_name(method));
  return library_difference(R"({"name": "task", "model_type": ")" + model + R"(", "config": )" + config + "}");
}

TEST(LibraryDifferences, OnlyWhatDiffersIsRefused) {
  EXPECT_NE(of("albert", "double_seq_bn").refused.find("on ALBERT"), std::string::npos);
  EXPECT_EQ(of("albert", "seq_bn").refused, "");
  EXPECT_EQ(of("bert", "double_seq_bn").refused, "");
  EXPECT_NE(of("gptj", "par_bn").refused.find("on GPT-J"), std::string::npos);
  EXPECT_EQ(of("gptj", "lora").refused, "");
  EXPECT_NE(of("mt5", "prefix_tuning").refused.find("on T5"), std::string::npos);
  EXPECT_EQ(of("t5", "lora").refused, "");
}

TEST(LibraryDifferences, WhatTheDirectoryDoesNotSayIsWarnedOf) {
  EXPECT_NE(of("distilbert", "unipelt").warned.find("adds 1"), std::string::npos);
  EXPECT_NE(of("mbart", "mam").warned.find("first tokens"), std::string::npos);
  EXPECT_NE(of("deberta", "lora").warned.find("random bias"), std::string::npos);
  EXPECT_EQ(of("distilbert", "lora").warned, "");
  EXPECT_EQ(of("deberta", "ia3").refused, "");
  EXPECT_NE(of("deberta", "ia3").warned, "");  // (IA)^3 is on the packed projection, too
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
