#include <torchgraft/patch/text_limits.h>

#include "encoder.h"

#include <torchgraft/config/adapter_config.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/verify.h>

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft::testing {
namespace {

// An encoder of texts of at most 6 tokens below 9.
torch::jit::Module text_encoder() {
  at::manual_seed(0);
  torch::jit::Module module("TextEncoder");
  module.register_attribute("training", c10::BoolType::get(), false);
  module.register_parameter("tokens", at::randn({9, kHidden}), /*is_buffer=*/false);
  module.register_parameter("positions", at::randn({6, kHidden}), /*is_buffer=*/false);
  module.register_module("layer", encoder_layer());
  module.define(R"python(
def forward(self, ids: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    places = torch.embedding(self.positions, torch.arange(ids.size(1)))
    return self.layer.forward(torch.embedding(self.tokens, ids) + places, mask)
)python");
  return module;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(TextLimits, AFaultNamesWhatTheModelHas) {
  const TextLimits limits{9, 3};
  EXPECT_FALSE(text_fault(limits, {0, 8, 4}));
  const auto too_long = text_fault(limits, {0, 8, 4, 9});
  ASSERT_TRUE(too_long && too_long->is_too_long);
  EXPECT_EQ(too_long->message, "expected at most 3 tokens in a row, which the model has positions for, got 4");
  for (const int64_t id : {-1, 9}) {
    const auto wrong = text_fault(limits, {0, id});
    ASSERT_TRUE(wrong && !wrong->is_too_long);
    EXPECT_EQ(wrong->message, "expected token ids from 0 and below 9, which the model has, got " + std::to_string(id));
  }
  EXPECT_FALSE(text_fault({std::nullopt, 3}, {-1, 900}));
}

TEST(TextLimits, RowsThatAnArgumentIndexes) {
  torch::jit::Module module("Decoder");
  module.register_attribute("training", c10::BoolType::get(), false);
  module.register_attribute("past_end", c10::BoolType::get(), false);
  module.register_parameter("tokens", at::randn({9, kHidden}), /*is_buffer=*/false);
  module.register_parameter("places", at::randn({6, kHidden}), /*is_buffer=*/false);
  module.register_parameter("few", at::randn({2, kHidden}), /*is_buffer=*/false);
  module.define(R"python(
def look(self, ids: Tensor, padding: Optional[int]) -> Tensor:
    if padding is not None:
        ids = ids + padding
    return torch.embedding(self.tokens, ids)

def forward(self, ids: Tensor, positions: Tensor, past: Tensor) -> Tensor:
    y = self.look(ids.view(-1, ids.size(1)), None) + torch.embedding(self.places, positions)
    if self.past_end:
        y = y + torch.embedding(self.few, ids)
    return y + past + torch.embedding(self.few, past.long() + 1)
)python");
  EXPECT_EQ(rows_indexed_by(module, 1), 9);
  EXPECT_EQ(rows_indexed_by(module, 2), 6);
  EXPECT_EQ(rows_indexed_by(module, 3), std::nullopt);
  EXPECT_EQ(rows_indexed_by(module, 4), std::nullopt);
}

TEST(TextLimits, ExamplesOfACppHostAreChecked) {
  const torch::jit::Module base = text_encoder();
  const AdapterSpec spec{"task", config_from_name("lora")};
  const torch::jit::Module grafted = graft(base, {spec}, {});
  at::Tensor wrong = at::ones({2, 5}, at::kLong);
  wrong[1][3] = 9;
  const std::vector<std::pair<at::Tensor, std::string>> cases = {
      {wrong, "example inputs: row 1: expected token ids from 0 and below 9, which the model has, got 9"},
      {at::ones({1, 7}, at::kLong),
       "example inputs: row 0: expected at most 6 tokens in a row, which the model has positions for, got 7"}};
  for (const auto& [ids, text] : cases) {
    GraftOptions options;
    options.example = std::vector<c10::IValue>{ids, c10::IValue()};
    EXPECT_NE(message_of([&] { graft(base, {spec}, options); }).find(text), std::string::npos);
    EXPECT_NE(message_of([&] { verify(grafted, options.example); }).find(text), std::string::npos);
  }
}

}  // namespace
}  // namespace torchgraft::testing
