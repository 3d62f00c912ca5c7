#include "structures.h"
#include "support.h"

#include <torchgraft/plan/adapter_weights.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::bert_like;
using testing::error_of;

AdapterConfig small_lora() {
  LoRAConfig config;
  config.r = 2;
  config.attn_matrices = {"q"};
  return AdapterConfig{{config}};
}

StateDict lora_state(const std::string& prefix, int64_t layers, int64_t hidden = 12) {
  StateDict state;
  for (int64_t i = 0; i < layers; ++i) {
    const std::string path = prefix + "encoder.layer." + std::to_string(i) + ".attention.self.query.loras.t.";
    state[path + "lora_A"] = at::full({2, hidden}, i + 1.0);
    state[path + "lora_B"] = at::full({12, 2}, -(i + 1.0));
  }
  return state;
}

AdapterWeights read(const StateDict& state, const AdapterConfig& config = small_lora(), int64_t layers = 2) {
  const Structure structure = bert_like(layers);
  return adapter_hub_weights(make_plan(structure, config), structure, state, "t", at::kDouble);
}

TEST(AdapterHub, FindsLayersWhateverThePathStartsWith) {
  for (const std::string prefix : {"", "bert.", "model.bert."}) {
    const AdapterWeights weights = read(lora_state(prefix, 2));
    EXPECT_EQ(weights.at(1).at("lora_a").scalar_type(), at::kDouble);
    EXPECT_EQ(weights[1].at("lora_a")[0][0].item<double>(), 2);
    EXPECT_EQ(weights[1].at("scaling").item<double>(), 4);  // alpha 8 / r 2
  }
}

TEST(AdapterHub, FlatPrefixesAreCutIntoLayers) {
  PrefixTuningConfig config;
  config.flat = true;
  config.prefix_length = 2;
  const int64_t size = 2 * 2 * 2 * 3 * 4;  // length x layers x (key, value) x heads x head size
  const AdapterWeights weights =
      read({{"prefix_tuning.prefix_tunings.t.self_prefix.control_trans", at::arange(size, at::kDouble)}},
           AdapterConfig{{config}});
  EXPECT_EQ(weights.at(0).at("prefix_key")[0][0][0].item<double>(), 0);
  EXPECT_EQ(weights.at(0).at("prefix_value")[0][0][0].item<double>(), 12);
  EXPECT_EQ(weights.at(1).at("prefix_key")[0][0][0].item<double>(), 24);
  EXPECT_EQ(weights.at(1).at("prefix_key")[2][1][3].item<double>(), 48 + 24 + 11);
}

TEST(AdapterHub, ErrorsNameTheKey) {
  StateDict missing = lora_state("", 2);
  missing.erase("encoder.layer.1.attention.self.query.loras.t.lora_B");
  EXPECT_NE(error_of([&] { read(missing); }).find("lora_b of selfattn_lora_q of layer 1 is missing"),
            std::string::npos);
  EXPECT_NE(error_of([&] { read(lora_state("", 3)); }).find("encoder.layer.2.attention.self.query"), std::string::npos);
  EXPECT_NE(error_of([&] { read(lora_state("", 2, 8)); }).find("trained for hidden size 8, the model has 12"),
            std::string::npos);
  StateDict foreign = lora_state("", 2);
  foreign["heads.t.weight"] = at::zeros({2});
  EXPECT_NE(error_of([&] { read(foreign); }).find("heads.t.weight is not a weight of an adapter 't'"),
            std::string::npos);
  StateDict integers = lora_state("", 2);
  for (auto& [key, tensor] : integers) {
    tensor = tensor.to(at::kLong);
  }
  EXPECT_NE(error_of([&] { read(integers); }).find("floating-point type, got Long"), std::string::npos);
}

}  // namespace
}  // namespace torchgraft
