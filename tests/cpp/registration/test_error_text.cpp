#include <torchgraft/registration/error_text.h>

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace torchgraft {
namespace {

// As TorchScript's interpreter writes it.
const std::string kTrace =
    "The following operation failed in the TorchScript interpreter.\n"
    "Traceback of TorchScript (most recent call last):\n"
    "  File \"<string>\", line 3, in forward\n"
    "    raise ValueError(\"Error: not this\")\n"
    "    ~~~~~ <--- HERE\n";

std::string line_of(const std::string& message) { return one_line(message); }

TEST(OneLine, IsTheFirstOfAMessageWithoutATrace) {
  EXPECT_EQ(line_of("base.pt: no such file"), "base.pt: no such file");
  EXPECT_EQ(line_of("graft: no attention was found; near misses:\n  encoder.0"),
            "graft: no attention was found; near misses:");
}

TEST(OneLine, IsWhatTorchScriptRaisedBehindItsTrace) {
  EXPECT_EQ(line_of(kTrace + "RuntimeError: gated_lora: expected rank 4, got 3\n"),
            "gated_lora: expected rank 4, got 3");
  EXPECT_EQ(line_of(kTrace + "RuntimeError: gated_lora: bad\nException raised from check at check.cpp:9\nframe #0: x"),
            "gated_lora: bad");
}

TEST(OneLine, IsTheTextOfAFailedAssert) {
  EXPECT_EQ(line_of(kTrace + "RuntimeError: AssertionError: no adapter is active\n"), "no adapter is active");
}

TEST(OneLine, KeepsTheWordErrorInsideALine) {
  EXPECT_EQ(line_of("base.pt: cannot be loaded (OSError: gone)"), "base.pt: cannot be loaded (OSError: gone)");
  EXPECT_EQ(line_of(kTrace + "RuntimeError: the log says Error: 3"), "the log says Error: 3");
}

TEST(OneLine, SkipsEmptyLinesBeforeTheMessage) {
  EXPECT_EQ(line_of("\n  \nUnknown builtin op: other::twice.\nCould not find any similar op.\n"),
            "Unknown builtin op: other::twice.");
}

TEST(OneLine, IsNeverEmpty) {
  for (const std::string& message : {std::string(), std::string("\n"), kTrace + "RuntimeError: AssertionError: \n"}) {
    EXPECT_EQ(line_of(message), "it did not say why") << message;
  }
}

TEST(OneLine, OfATorchErrorHasNoBacktrace) {
  try {
    TORCH_CHECK(false, "expected one adapter, got ", 2);
  } catch (const std::exception& error) {
    EXPECT_EQ(one_line(error), "expected one adapter, got 2");
  }
  EXPECT_EQ(one_line(std::runtime_error("expected a list")), "expected a list");
}

}  // namespace
}  // namespace torchgraft
