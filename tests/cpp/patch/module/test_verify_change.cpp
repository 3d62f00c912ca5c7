#include "encoder.h"

#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_change.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::error_of;
using testing::make_module;

torch::jit::Module module_of(const std::string& body) {
  return make_module({{"w", at::ones({3})}}, "def forward(self, x: Tensor):\n    y = x * self.w\n" + body);
}

std::string verify(const torch::jit::Module& before, const torch::jit::Module& after) {
  return verify_change(before, {{{before}, {after}, "the other"}}, std::vector<c10::IValue>{at::randn({2, 3})},
                       Verifier{"test"});
}

// float64 settles what rounding may have moved. In source that is compiled in C++ dtypes are numbers: 6 is float.
TEST(VerifyChange, ADifferenceOfStructureIsFinal) {
  const torch::jit::Module before = module_of("    return y\n");
  for (const char* other : {"y[0]", "y.to(15)"}) {
    SCOPED_TRACE(other);
    const torch::jit::Module after =
        module_of(std::string("    if x.dtype == 6:\n        y = ") + other + "\n    return y\n");
    const std::string error = error_of([&] { verify(before, after); });
    EXPECT_NE(error.find("differs by its structure, a shape or a dtype"), std::string::npos) << error;
  }
}

TEST(VerifyChange, Float64ExcusesWhatRoundingMoves) {
  const torch::jit::Module before = module_of("    return torch.gt(y - y, 0), y\n");
  const torch::jit::Module after = module_of(R"(
    larger = torch.gt(y - y, 0)
    if x.dtype == 6:
        larger = torch.ge(y - y, 0)
    return larger, y
)");
  EXPECT_EQ(verify(before, after), "");
}

torch::jit::Module with_two_adapters() {
  GraftOptions options;
  options.verify = false;
  const AdapterConfig config = config_from_string("lora[init_weights='bert']");
  return graft(testing::encoder(), {{"a", config, std::nullopt, ""}, {"b", config, std::nullopt, ""}}, options);
}

// The run before had 'a' active, which is the same in both.
TEST(VerifyChange, AnAdapterIsActiveForItsOwnRunOnly) {
  const torch::jit::Module before = with_two_adapters();
  const torch::jit::Module after = before.clone();
  before.get_method("activate")({"b"});
  after.get_method("deactivate")({});
  const std::vector<SameResult> pairs = {{{before, "forward", "a"}, {after, "forward", "a"}, "'a'"},
                                         {{before}, {after}, "the module"}};
  const std::string error = error_of(
      [&] { verify_change(before, pairs, std::vector<c10::IValue>{at::randn({2, 5, 12})}, Verifier{"test"}); });
  EXPECT_NE(error.find("the result of the module is another"), std::string::npos) << error;
}

TEST(VerifyChange, WhatWasActiveIsActiveAgainAfterAFailure) {
  const torch::jit::Module module = with_two_adapters();
  for (const std::string before : {"b", ""}) {
    if (before.empty()) {
      module.get_method("deactivate")({});
    } else {
      module.get_method("activate")({before});
    }
    EXPECT_THROW(
        {
          const WhileActive active(module, "a");
          EXPECT_EQ(active_name(module), "a");
          throw std::runtime_error("a run failed");
        },
        std::runtime_error);
    EXPECT_EQ(active_name(module), before);
    {
      const WhileActive active(module, "");
    }
    EXPECT_EQ(active_name(module), before);
    EXPECT_THROW(WhileActive(module, "nosuch"), std::exception);
    EXPECT_EQ(active_name(module), before);
  }
}

}  // namespace
}  // namespace torchgraft
