#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>

// This file includes no header of the library on purpose: see CMakeLists.txt.

namespace {

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

std::string schema(const char* name) {
  std::ostringstream text;
  text << find(name).schema();
  return text.str();
}

TEST(Schemas, AreFrozen) {
  EXPECT_EQ(schema("torchgraft::gated_bottleneck"),
            "torchgraft::gated_bottleneck(Tensor x, Tensor residual, Tensor down_weight, Tensor down_bias, "
            "Tensor up_weight, Tensor up_bias, Tensor scaling, str non_linearity, Tensor? gate_weight=None, "
            "Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, Tensor? token_mask=None) "
            "-> (Tensor output, Tensor gate)");
  EXPECT_EQ(schema("torchgraft::gated_lora"),
            "torchgraft::gated_lora(Tensor x, Tensor base, Tensor lora_a, Tensor lora_b, Tensor scaling, "
            "Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, "
            "Tensor? token_mask=None) -> (Tensor output, Tensor gate)");
  EXPECT_EQ(schema("torchgraft::gated_bottleneck_linear"),
            "torchgraft::gated_bottleneck_linear(Tensor x, Tensor input, Tensor weight, Tensor? bias, "
            "Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Tensor scaling, "
            "str non_linearity, Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? adapter_ids=None, "
            "int adapter=0, Tensor? token_mask=None) -> (Tensor output, Tensor gate)");
  EXPECT_EQ(schema("torchgraft::gated_lora_linear"),
            "torchgraft::gated_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, "
            "Tensor scaling, Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? adapter_ids=None, "
            "int adapter=0, Tensor? token_mask=None) -> (Tensor output, Tensor gate)");
  EXPECT_EQ(schema("torchgraft::gated_prefix_attention"),
            "torchgraft::gated_prefix_attention(Tensor query, Tensor key, Tensor value, Tensor x, Tensor prefix_key, "
            "Tensor prefix_value, Tensor prefix_length, Tensor? attn_mask=None, float dropout_p=0., "
            "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, Tensor? gate_weight=None, "
            "Tensor? gate_bias=None, Tensor? adapter_ids=None, int adapter=0, Tensor? token_mask=None) "
            "-> (Tensor output, Tensor gate)");
  EXPECT_EQ(schema("torchgraft::attention_token_mask"),
            "torchgraft::attention_token_mask(Tensor x, Tensor? attn_mask=None) -> Tensor");
  EXPECT_EQ(schema("torchgraft::reft"),
            "torchgraft::reft(Tensor x, Tensor source_weight, Tensor source_bias, Tensor projection, "
            "Tensor subtraction, Tensor positions, str non_linearity=\"linear\", Tensor? adapter_ids=None, "
            "int adapter=0, Tensor? token_mask=None) -> Tensor");
  EXPECT_EQ(schema("torchgraft::linear"),
            "torchgraft::linear(Tensor x, Tensor weight, Tensor? bias=None, str non_linearity=\"linear\") -> Tensor");
  EXPECT_EQ(schema("torchgraft::residual_norm"),
            "torchgraft::residual_norm(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, "
            "Tensor? bias=None, float eps=1.0000000000000001e-05) -> (Tensor output, Tensor sum)");
}

TEST(Library, TellsItsVersionToThoseWhoLoadIt) {
  void* symbol = dlsym(RTLD_DEFAULT, "_ZN10torchgraft7versionEv");
  ASSERT_NE(symbol, nullptr);
  EXPECT_STREQ(reinterpret_cast<const char* (*)()>(symbol)(), TORCHGRAFT_EXPECTED_VERSION);
}

}  // namespace
