#include <torchgraft/config/adapter_config.h>
#include <torchgraft/config/head_config.h>
#include <torchgraft/registration/parse_json.h>

#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace torchgraft {
namespace {

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

std::string nested(size_t levels, const std::string& open = "[", const std::string& close = "]",
                   const std::string& inner = "1") {
  std::string text;
  for (size_t i = 0; i < levels; ++i) {
    text += open;
  }
  text += inner;
  for (size_t i = 0; i < levels; ++i) {
    text += close;
  }
  return text;
}

TEST(ParseJson, ALongValueIsCutBetweenCharacters) {
  const nlohmann::json umlauts = "\u00e4\u00e4\u00e4\u00e4";  // "ää" has six bytes with its quotation marks
  EXPECT_EQ(shown_json(umlauts), "\"\u00e4\u00e4\u00e4\u00e4\"");
  EXPECT_EQ(shown_json(umlauts, 10), "\"\u00e4\u00e4\u00e4\u00e4\"");
  EXPECT_EQ(shown_json(umlauts, 5), "\"\u00e4\u00e4...");
  EXPECT_EQ(shown_json(umlauts, 4), "\"\u00e4...");
  EXPECT_EQ(shown_json(nlohmann::json("\xff"), 9), "\"\ufffd\"");
}

TEST(ParseJson, NestingHasALimit) {
  EXPECT_TRUE(parse_json(nested(kDeepestJson), "a.json").is_array());
  EXPECT_TRUE(parse_json("[[]]", "a.json", 2).is_array());
  EXPECT_EQ(message_of([] { parse_json(nested(kDeepestJson + 1), "a.json"); }),
            "a.json: nested too deeply, expected JSON of at most 64 levels");
  for (const std::string& text : {nested(1'000'000), nested(1'000'000, R"({"a":)", "}"), std::string(1'000'000, '['),
                                  nested(1'000'000, "[{\"]\\\"\":", "}]"), "[\"\\\\\"," + nested(100) + "]"}) {
    EXPECT_NE(message_of([&] { parse_json(text, "a.json"); }).find("a.json: nested too deeply"), std::string::npos);
  }
}

TEST(ParseJson, BracketsInStringsAreNoNesting) {
  const std::string text = "\"" + std::string(1000, '[') + "\\\"" + std::string(1000, '{') + "\"";
  EXPECT_EQ(parse_json("{\"a\": " + text + "}", "a.json").at("a").get<std::string>().size(), 2001u);
}

TEST(ParseJson, WhatIsNoJsonIsNamed) {
  for (const std::string& text : {std::string("{"), std::string(""), std::string("nul"), std::string("1e400"),
                                  std::string("[-1e999]"), std::string("\"\xff\""), std::string("\"\\ud800\""),
                                  std::string("{\"a\": 1} x"), "\"\xff" + std::string(10'000, 'x') + "\""}) {
    const std::string message = message_of([&] { parse_json(text, "a.json"); });
    EXPECT_EQ(message.find("a.json: not JSON ("), 0u) << message;
    EXPECT_EQ(message.find("json.exception"), std::string::npos) << message;
    EXPECT_LT(message.size(), 300u);
    EXPECT_TRUE(std::all_of(message.begin(), message.end(), [](char c) { return c >= ' ' && c < 0x7f; })) << message;
  }
}

TEST(ParseJson, EveryConfigurationIsReadWithIt) {
  const std::string deep = R"({"config": )" + nested(1'000'000) + "}";
  EXPECT_NE(message_of([&] { config_from_json(deep); }).find("nested too deeply"), std::string::npos);
  EXPECT_NE(message_of([&] { head_config_from_json(deep); }).find("nested too deeply"), std::string::npos);
  EXPECT_NE(message_of([&] { is_known_head(deep); }).find("nested too deeply"), std::string::npos);
  EXPECT_NE(message_of([&] { config_from_string("lora[leave_out=" + nested(1'000'000) + "]"); }).find("nested too"),
            std::string::npos);
  EXPECT_NE(message_of([] { config_from_string("lora[alpha=1e400]"); }).find("not JSON"), std::string::npos);
  EXPECT_NE(message_of([] { check_supported(config_from_string("seq_bn[non_linearity='\xff']")); }).find("non_linear"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
