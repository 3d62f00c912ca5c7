#include "structures.h"
#include "support.h"

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/config_string.h>
#include <torchgraft/plan/init_weights.h>
#include <torchgraft/plan/library_layers.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/prefix_mlp.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

namespace torchgraft {
namespace {

using testing::add_feed_forward;
using testing::append;
using testing::attention_at;
using testing::error_of;

void add_tower(Structure& structure, const std::string& name, int64_t layers, int64_t stack,
               const std::string& container = "encoder.layers") {
  for (int64_t i = 0; i < layers; ++i) {
    const std::string path = c10::str("model.", name, ".", container, ".", i);
    Layer layer = attention_at(AttentionKind::kSelf, path + ".self_attn");
    layer.stack = stack;
    add_feed_forward(layer, path + ".mlp.fc1", path + ".mlp.fc2");
    append(structure, layer);
  }
}

// Layers 0 to 2 are of the pictures, which run first, 3 and 4 of the text: 0 and 1 in the library.
Structure clip() {
  Structure structure;
  add_tower(structure, "vision_model", 3, 0);
  add_tower(structure, "text_model", 2, 1);
  return structure;
}

AdapterConfig of_library(const std::string& config) {
  return config_from_json(c10::str("{\"model_type\": \"clip\", \"config\": ", config, "}"));
}

const char* const kLora = R"({"architecture": "lora", "leave_out": [0, 2]})";
const char* const kBottleneck =
    R"({"mh_adapter": false, "output_adapter": true, "non_linearity": "relu",
        "reduction_factor": {"0": 2, "4": 3, "default": 6}})";

std::vector<int64_t> left_out(const AdapterConfig& config) {
  return std::visit(
      [](const auto& method) {
        if constexpr (requires { method.leave_out; }) {
          return method.leave_out;
        }
        return std::vector<int64_t>();
      },
      config.methods.front());
}

TEST(LibraryLayers, TheTextsComeFirst) {
  const AdapterConfig lora = of_library(kLora);
  EXPECT_EQ(lora.wired_for, "clip");
  const AdapterConfig found = numbered_as_found(lora, clip());
  EXPECT_EQ(left_out(found), (std::vector<int64_t>{3, 0}));
  EXPECT_EQ(found.wired_for, "");
  const AdapterConfig bottleneck = numbered_as_found(of_library(kBottleneck), clip());
  EXPECT_EQ((std::get<std::map<std::string, double>>(std::get<BnConfig>(bottleneck.methods.front()).reduction_factor)),
            (std::map<std::string, double>{{"3", 2}, {"2", 3}, {"default", 6}}));
}

TEST(LibraryLayers, ReftAndPrefixesAreNumberedToo) {
  AdapterConfig config = config_from_string("loreft[layers=[1, 3]]");
  config.wired_for = "clip";
  EXPECT_EQ(
      std::get<std::vector<int64_t>>(std::get<ReftConfig>(numbered_as_found(config, clip()).methods.front()).layers),
      (std::vector<int64_t>{4, 1}));
  config = config_from_string("prefix_tuning[leave_out=[4]]");
  config.wired_for = "clip";
  EXPECT_EQ(left_out(numbered_as_found(config, clip())), std::vector<int64_t>{2});
}

TEST(LibraryLayers, BackAgain) {
  for (const char* config : {kLora, kBottleneck}) {
    const AdapterConfig library = of_library(config);
    const AdapterConfig again = numbered_as_in_library(numbered_as_found(library, clip()), clip());
    EXPECT_EQ(config_to_json(again), config_to_json(library));
  }
  // Nothing to number, or another model.
  EXPECT_EQ(numbered_as_in_library(config_from_string("lora"), clip()).wired_for, "");
  const AdapterConfig lora = config_from_string("lora[leave_out=[1]]");
  EXPECT_EQ(config_to_json(numbered_as_in_library(lora, testing::bert_like(3))), config_to_json(lora));
  // A layer that is not there means nothing.
  EXPECT_EQ(left_out(numbered_as_in_library(config_from_string("lora[leave_out=[3, 9]]"), clip())),
            std::vector<int64_t>{0});
}

TEST(LibraryLayers, PlansReadTheLibrarysNumbers) {
  std::vector<int64_t> numbers;
  AdapterConfig config = config_from_string("seq_bn[leave_out=[0, 3]]");
  config.wired_for = "clip";
  for (const PlannedModule& module : make_plan(clip(), config)) {
    numbers.push_back(module.number);
  }
  EXPECT_EQ(numbers, (std::vector<int64_t>{0, 2, 4}));
}

TEST(LibraryLayers, WhatIsNoWholeClipIsRefused) {
  Structure frozen = clip();
  for (Layer& layer : frozen.layers) {
    layer.query = layer.key = layer.value = Projection{"", 12, 12};
  }
  Structure tower;
  add_tower(tower, "text_model", 2, 0);
  Structure second_half;  // its first layer is not the tower's
  add_tower(second_half, "vision_model", 2, 0);
  add_tower(second_half, "text_model", 2, 1);
  second_half.layers.erase(second_half.layers.begin());
  Structure others = clip();  // a third part
  append(others, attention_at(AttentionKind::kSelf, "decoder.layers.0.self_attn"));
  for (const Structure& structure : {frozen, tower, second_half, others, testing::bart_like(1)}) {
    EXPECT_FALSE(is_whole_clip(structure));
    const std::string error = error_of([&] { numbered_as_found(of_library(kLora), structure); });
    EXPECT_NE(error.find("do not show two towers"), std::string::npos) << error;
  }
  const std::string error =
      error_of([&] { numbered_as_found(of_library(R"({"architecture": "lora", "leave_out": [5]})"), clip()); });
  EXPECT_NE(error.find("names layer 5, and this CLIP has layers 0 to 4"), std::string::npos) << error;
}

TEST(LibraryLayers, EachTowerHasPrefixesOfItsOwn) {
  Structure structure = clip();
  for (size_t i = 3; i < 5; ++i) {
    structure.layers[i].hidden_size = 20;
    structure.layers[i].num_kv_heads = 5;
  }
  const Plan plan = make_plan(structure, config_from_string("prefix_tuning[leave_out=[1]]"));
  std::vector<std::string> groups;
  for (const PlannedModule& module : plan) {
    const auto& prefix = std::get<PlannedPrefix>(module.method);
    groups.push_back(c10::str(module.number, " ", prefix.pool, " ", prefix.group_index, "/", prefix.group_size));
  }
  EXPECT_EQ(groups,
            (std::vector<std::string>{"0 clip_vision_model_self_prefix 0/2", "2 clip_vision_model_self_prefix 1/2",
                                      "3 clip_text_model_self_prefix 0/2", "4 clip_text_model_self_prefix 1/2"}));
  EXPECT_NO_THROW(check_prefix_groups(plan));
  const AdapterWeights weights = init_weights(plan, at::TensorOptions());
  EXPECT_EQ(weights.front().at("prefix_key").sizes(), (std::vector<int64_t>{3, 30, 4}));
  EXPECT_EQ(weights.back().at("prefix_key").sizes(), (std::vector<int64_t>{5, 30, 4}));
}

TEST(LibraryLayers, OneMlpCannotMakePrefixesOfTwoSizes) {
  Structure structure = testing::bert_like(2);
  structure.layers[1].num_kv_heads = 1;
  const std::string error =
      error_of([&] { check_prefix_groups(make_plan(structure, config_from_string("prefix_tuning"))); });
  EXPECT_NE(error.find("3 heads of 4 in layer 0, 1 heads of 4 in layer 1"), std::string::npos) << error;
}

TEST(LibraryLayers, AnMlpOfBothTowersIsSplit) {
  const Structure structure = clip();
  const Plan plan = make_plan(structure, config_from_string("prefix_tuning[prefix_length=3, bottleneck_size=5]"));
  const int64_t out = 5 * 2 * 12;
  const ModuleWeights whole = {{"embeddings", at::randn({3, 12})},
                               {"down_weight", at::randn({5, 12})},
                               {"down_bias", at::randn({5})},
                               {"up_weight", at::randn({out, 5})},
                               {"up_bias", at::randn({out})}};
  Reparametrisation sources = {{"self_prefix", whole}};
  split_by_tower(plan, structure, sources);
  EXPECT_EQ(sources.size(), 2u);
  for (size_t i = 0; i < plan.size(); ++i) {
    const auto& prefix = std::get<PlannedPrefix>(plan[i].method);
    PlannedPrefix before = prefix;
    before.group_index = static_cast<int64_t>(i);
    before.group_size = 5;
    const auto expected = prefix_of_layer(eject(whole, "tanh"), before);
    const auto got = prefix_of_layer(eject(sources.at(prefix.pool), "tanh"), prefix);
    EXPECT_TRUE(at::allclose(got.first, expected.first)) << i;
    EXPECT_TRUE(at::allclose(got.second, expected.second)) << i;
  }
  Reparametrisation again = sources;
  split_by_tower(plan, structure, again);
  EXPECT_EQ(again.size(), 2u);
}

TEST(LibraryLayers, TowersOfOtherContainersAreNoClip) {
  Structure structure;
  add_tower(structure, "vision_model", 3, 0, "layer");
  add_tower(structure, "text_model", 2, 1, "layer");
  EXPECT_FALSE(is_whole_clip(structure));
}

}  // namespace
}  // namespace torchgraft
