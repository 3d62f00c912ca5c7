#include "op_test.h"

#include <ATen/Version.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/kernel_table.h>

// What a user's measurements say, and what is said of files that hold none.
namespace torchgraft::ops::test {
namespace {

std::string table(const std::string& set, const std::string& measurements) {
  return R"({"kernel_table": 1, "instruction_set": ")" + set + R"(", "measurements": [)" + measurements + "]}";
}

std::string measured(const std::string& op, const std::string& dtype, int tokens, int features, double fused,
                     double reference) {
  return c10::str(R"({"op": ")", op, R"(", "dtype": ")", dtype, R"(", "tokens": )", tokens, R"(, "features": )",
                  features, R"(, "fused": )", fused, R"(, "reference": )", reference, "}");
}

TEST(KernelTable, TheNearestSizeDecides) {
  const std::string here = kernel_instruction_set();
  const KernelTable table =
      KernelTable::parse(test::table(here, measured("gated_lora_linear", "float32", 16, 768, 1.0, 2.0) + "," +
                                               measured("gated_lora_linear", "float32", 1024, 768, 2.0, 1.0) + "," +
                                               measured("gated_lora_linear", "float32", 16, 384, 2.0, 1.0) + "," +
                                               measured("gated_lora_linear", "bfloat16", 16, 768, 2.0, 1.0) + "," +
                                               measured("gated_bottleneck", "float32", 16, 768, 1.0, 1.0)),
                         "here");
  const auto linear = [&table](int64_t tokens, int64_t features) {
    return table.fused_is_faster(FusedOp::kLoraLinear, at::kFloat, tokens, features);
  };
  EXPECT_EQ(linear(16, 768), true);
  EXPECT_EQ(linear(1, 4096), true);
  EXPECT_EQ(linear(127, 768), true) << "by the ratio: the middle of 16 and 1024 is 128";
  EXPECT_EQ(linear(129, 768), false);
  EXPECT_EQ(linear(16, 400), false);
  EXPECT_EQ(table.fused_is_faster(FusedOp::kLoraLinear, at::kBFloat16, 16, 768), false);
  EXPECT_EQ(table.fused_is_faster(FusedOp::kBottleneck, at::kFloat, 500, 70), true) << "as fast: the fused one";
  EXPECT_EQ(table.fused_is_faster(FusedOp::kBottleneck, at::kBFloat16, 16, 768), std::nullopt);
  EXPECT_EQ(table.fused_is_faster(FusedOp::kLora, at::kFloat, 16, 768), std::nullopt);
}

TEST(KernelTable, OfAnotherInstructionSetSaysNothing) {
  const std::string one = measured("gated_lora", "float32", 16, 768, 1.0, 2.0);
  EXPECT_EQ(KernelTable::parse(table("none", one), "here").fused_is_faster(FusedOp::kLora, at::kFloat, 16, 768),
            std::nullopt);
  EXPECT_EQ(KernelTable().fused_is_faster(FusedOp::kLora, at::kFloat, 16, 768), std::nullopt);
}

// The first line of what parsing throws; "" when it does not.
std::string error_of(const std::string& text) {
  try {
    KernelTable::parse(text, "here.json");
  } catch (const c10::Error& error) {
    return error.msg();
  }
  return "";
}

TEST(KernelTable, DamagedFilesAreNamed) {
  const std::string good = measured("gated_lora", "float32", 16, 768, 1.0, 2.0);
  const std::string tables = table("AVX2", good);
  EXPECT_EQ(error_of(tables), "");
  for (size_t length = 0; length < tables.size(); ++length) {
    EXPECT_EQ(error_of(tables.substr(0, length)).find("here.json: not JSON ("), 0) << length;
  }
  for (const char* text : {"[]", "3", "null", "{}", R"({"kernel_table": "1"})", R"({"kernel_table": 1})",
                           R"({"kernel_table": 1, "instruction_set": "AVX2", "measurements": [3]})"}) {
    EXPECT_EQ(error_of(text).find("here.json: expected what torchgraft tune writes, got "), 0) << text;
  }
  EXPECT_EQ(error_of(R"({"kernel_table": true})"), "here.json: expected \"kernel_table\" to be a number, got true");
  EXPECT_EQ(error_of(R"({"kernel_table": 1, "instruction_set": "x", "measurements": [{"op": "linear",
                         "dtype": "float32", "tokens": true}]})"),
            "here.json: expected \"tokens\" to be a number, got true");
  EXPECT_EQ(error_of(R"({"kernel_table": 2})"), "here.json: expected \"kernel_table\" to be 1, got 2");
  EXPECT_EQ(error_of(table("x", measured("gated_lore", "float32", 1, 1, 1, 1))),
            "here.json: expected \"op\" to be one of gated_lora, gated_lora_linear, gated_bottleneck, "
            "gated_bottleneck_linear, gated_prefix_attention, linear, got \"gated_lore\"");
  EXPECT_EQ(error_of(table("x", measured("gated_lora", "float16", 1, 1, 1, 1))),
            "here.json: expected \"dtype\" to be one of float32, bfloat16, got \"float16\"");
  EXPECT_EQ(error_of(table("x", measured("gated_lora", "float32", 0, 1, 1, 1))),
            "here.json: expected \"tokens\" to be a positive number, got 0");
  EXPECT_EQ(error_of(table("x", measured("gated_lora", "float32", 1, 1, 1, -1))),
            "here.json: expected \"reference\" to be a positive number, got -1");
}

}  // namespace
}  // namespace torchgraft::ops::test
