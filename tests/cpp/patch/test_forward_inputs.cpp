#include <torchgraft/patch/forward_inputs.h>

#include "support.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace torchgraft::testing {
namespace {

torch::jit::Module with_forward(const std::string& arguments) {
  return make_module({}, "def forward(self, " + arguments + ") -> int:\n    return 1\n");
}

ForwardInputs inputs_of(const std::string& arguments) { return ForwardInputs(with_forward(arguments)); }

// Ids of 1, a mask of 2, types of 3.
const TokenTensors kTokens{at::full({1, 2}, 1), at::full({1, 2}, 2), at::full({1, 2}, 3)};

// "1,2": the positional arguments, a tensor as its number.
std::string given(const std::string& arguments, const TokenTensors& tokens = kTokens) {
  const torch::jit::Module module = with_forward(arguments);
  const std::vector<c10::IValue> values = ForwardInputs(module).arguments(tokens);
  EXPECT_EQ(module.get_method("forward")(values).toInt(), 1);  // TorchScript takes them
  std::string text;
  for (const c10::IValue& value : values) {
    std::ostringstream one;
    value.isTensor() ? one << value.toTensor().flatten()[0].item<int64_t>() : one << value;
    text += (text.empty() ? "" : ",") + one.str();
  }
  return text;
}

TEST(ForwardInputs, GivesEveryArgumentWhatItIsNamedFor) {
  EXPECT_EQ(given("input_ids: Tensor, attention_mask: Tensor"), "1,2");
  EXPECT_EQ(given("padding_mask: Tensor, tokens: Tensor"), "2,1");
  EXPECT_EQ(given("input_ids: Tensor, token_type_ids: Optional[Tensor] = None, mask: Optional[Tensor] = None"),
            "1,3,2");
  EXPECT_EQ(given("input_ids: Tensor"), "1");
}

TEST(ForwardInputs, StopsBehindTheLastArgumentThatATextGives) {
  EXPECT_EQ(given("input_ids: Tensor, position_ids: Optional[Tensor] = None, flag: bool = True"), "1");
}

TEST(ForwardInputs, KeepsTheDefaultsOfArgumentsBetween) {
  EXPECT_EQ(given("x: Tensor, scale: float = 0.5, positions: Optional[Tensor] = None, mask: Optional[Tensor] = None"),
            "1,0.5,None,2");
}

TEST(ForwardInputs, TakesNoOtherTypeForItsName) {
  EXPECT_EQ(given("input_ids: Tensor, mask_value: int = 7, attention_mask: Optional[Tensor] = None"), "1,7,2");
}

TEST(ForwardInputs, LeavesAdapterIdsToTheCaller) {
  EXPECT_EQ(given("mask: Tensor, x: Tensor, adapter_ids: Optional[Tensor] = None"), "2,1");
  EXPECT_NE(error_of([] { inputs_of("mask: Tensor, adapter_ids: Optional[Tensor] = None"); }).find("no token ids"),
            std::string::npos);
}

TEST(ForwardInputs, TypesThatAreNotGivenAreAllZero) {
  const TokenTensors tokens{kTokens.ids, kTokens.mask};
  EXPECT_EQ(given("x: Tensor, types: Tensor", tokens), "1,0");
}

TEST(ForwardInputs, SaysWhereTheIdsGoAndWhetherThereIsAMask) {
  const ForwardInputs first = inputs_of("mask: Tensor, x: Tensor");
  EXPECT_EQ(first.ids_position(), 2);
  EXPECT_TRUE(first.takes_mask());
  const ForwardInputs second = inputs_of("x: Tensor, y: Optional[Tensor] = None");
  EXPECT_EQ(second.ids_position(), 1);
  EXPECT_FALSE(second.takes_mask());
}

TEST(ForwardInputs, ReadsTheMethodThatItIsTold) {
  const torch::jit::Module module = make_module({},
                                                "def forward(self, pixels: Tensor, sizes: Tensor) -> int:\n"
                                                "    return 1\n"
                                                "def encode(self, input_ids: Tensor) -> int:\n"
                                                "    return 2\n");
  EXPECT_EQ(ForwardInputs(module, "encode").arguments(kTokens).size(), 1);
  EXPECT_THROW(ForwardInputs{module}, c10::Error);
}

TEST(ForwardInputs, NamesTheArgumentThatATextDoesNotGive) {
  EXPECT_EQ(
      error_of([] { inputs_of("input_ids: Tensor, pixels: Tensor"); }),
      "forward's argument 'pixels' is none that a text gives (token ids, a mask, token types) and has no default; "
      "wrap the model in a module whose forward is forward(input_ids, attention_mask)");
  EXPECT_NE(error_of([] { inputs_of("length: int, input_ids: Tensor"); }).find("argument 'length'"), std::string::npos);
  EXPECT_NE(error_of([] { inputs_of("attention_mask: Tensor"); }).find("takes no token ids; wrap"), std::string::npos);
}

TEST(ForwardInputs, RefusesTokensWithoutTheMaskThatForwardTakes) {
  const ForwardInputs inputs = inputs_of("x: Tensor, mask: Tensor");
  EXPECT_NE(error_of([&] { inputs.arguments({kTokens.ids}); }).find("takes a mask, none was given"), std::string::npos);
}

}  // namespace
}  // namespace torchgraft::testing
