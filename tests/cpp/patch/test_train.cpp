#include "encoder.h"

#include <torchgraft/patch/adapters/adapter_bank.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/compose.h>
#include <torchgraft/patch/fusion.h>
#include <torchgraft/patch/head.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/train.h>

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;

AdapterSpec spec(const std::string& name, const std::string& config, bool trainable) {
  return {name, config_from_string(config), std::nullopt, "", trainable};
}

at::Tensor run(torch::jit::Module module, const at::Tensor& x) { return module.forward({x}).toTensor(); }

// The frozen adapters "a" and "b", and "both", Fuse(a, b), with a frozen value matrix.
torch::jit::Module two_fused() {
  const char* const kConfig = "seq_bn[reduction_factor=4, init_weights='bert']";
  auto module = graft(encoder(), {spec("a", kConfig, false), spec("b", kConfig, false)});
  const Composition fuse = composition_from_string("Fuse(a, b)");
  module = add_adapter_fusion(module, fuse, fusion_config_from_json(R"({"config": "dynamic"})"));
  return compose(module, "both", fuse);
}

class TrainStep : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Methods, TrainStep,
                         ::testing::Values("unipelt", "vera[vera_b=0.5]", "dvora[vera_b=0.5]", "seq_bn_inv",
                                           "mtl_lora[n_up_projection=2, init_weights='bert']", "loreft[r=2]",
                                           "noreft[r=2]", "direft[r=2]", "prompt_tuning[prompt_length=3]"));

TEST_P(TrainStep, ChangesTheTrainableAdapterAndNotTheFrozenOne) {
  auto module =
      graft(encoder(), {spec("still", "lora[init_weights='bert']", false), spec("learner", GetParam(), true)});
  const at::Tensor x = at::randn({2, 5, 12});
  const auto named = trainable_parameters(module, "learner");
  std::set<const c10::TensorImpl*> trained;
  for (const auto& [name, parameter] : named) {
    trained.insert(parameter.unsafeGetTensorImpl());
  }
  for (const at::Tensor& parameter : module.parameters()) {
    EXPECT_EQ(parameter.requires_grad(), trained.count(parameter.unsafeGetTensorImpl()) == 1);
  }
  module.get_method("activate")({"still"});
  const at::Tensor still = run(module, x).detach();
  module.get_method("activate")({"learner"});
  const at::Tensor before = run(module, x);
  before.square().sum().backward();
  {
    at::NoGradGuard no_grad;
    for (const auto& [name, parameter] : named) {
      ASSERT_TRUE(parameter.grad().defined()) << name;
      parameter.sub_(parameter.grad(), 0.1);
    }
  }
  EXPECT_GT(largest_difference(run(module, x), before), 1e-3);
  module.get_method("activate")({"still"});
  EXPECT_TRUE(at::equal(run(module, x), still));
}

TEST(Train, AFuseTrainsItsLayersAndItsHead) {
  const char* const kConfig = "seq_bn[reduction_factor=4, init_weights='bert']";
  auto module = graft(encoder(), {spec("a", kConfig, false), spec("b", kConfig, false)});
  const Composition fuse = composition_from_string("Fuse(a, b)");
  module = add_adapter_fusion(module, fuse, fusion_config_from_json(R"({"config": "dynamic"})"), /*trainable=*/true);
  module = compose(module, "both", fuse);
  module = add_head(module, "both", HeadConfig{});
  module.get_method("activate")({"both"});
  std::vector<at::Tensor> parameters;
  for (const auto& [name, parameter] : trainable_parameters(module, "both")) {
    EXPECT_TRUE(name.starts_with("adapters.fusion_") || name.starts_with("adapters.heads.adapter_both.")) << name;
    parameters.push_back(parameter);
  }
  EXPECT_EQ(parameters.size(), 2u * 5 + 4);  // two layers; a head of two maps
  const at::Tensor off = at::full({12, 12}, 1e-6).fill_diagonal_(0.0);
  EXPECT_NEAR(fusion_regularization_loss(module, "both").item<double>(), 2 * 0.01 * off.square().sum().item<double>(),
              1e-12);
  const at::Tensor x = at::randn({2, 5, 12});
  const auto loss = [&] {
    const at::Tensor logits = module.get_method("forward_with_head")({x}).toTensor();
    return (logits - at::ones({2, 2})).square().sum();
  };
  const double before = loss().item<double>();
  for (int step = 0; step < 20; ++step) {
    for (at::Tensor& parameter : parameters) {
      parameter.mutable_grad() = at::Tensor();
    }
    loss().backward();
    at::NoGradGuard no_grad;
    for (at::Tensor& parameter : parameters) {
      if (parameter.grad().defined()) {
        parameter.sub_(parameter.grad(), 0.05);
      }
    }
  }
  EXPECT_LT(loss().item<double>(), 0.5 * before);
  const auto frozen = freeze_adapter(module, "both");
  EXPECT_LT(largest_difference(run(frozen, x), run(module, x)), 1e-5);
  EXPECT_FALSE(list_adapters(frozen).back().trainable);
}

// (12, 12) and 12 numbers of query and of key, and the value's (12, 12), in two layers of float32.
TEST(Train, TheLayersOfAFuseAreCounted) {
  const auto module = two_fused();
  const AdapterInfo info = list_adapters(module).back();
  EXPECT_EQ(info.parameters, 2 * (3 * 144 + 2 * 12));
  EXPECT_EQ(info.bytes, 4 * info.parameters);
  EXPECT_EQ(info.by_location, (std::map<std::string, int64_t>{{"output_adapter", info.parameters}}));
  const int64_t with_head = list_adapters(add_head(module, "both", HeadConfig{})).back().parameters;
  EXPECT_EQ(with_head, info.parameters + 12 * 12 + 12 + 2 * 12 + 2);
  const auto stacked = compose(module, "stacked", composition_from_string("Stack(a, b)"));
  EXPECT_EQ(list_adapters(stacked).back().parameters, 0);
  EXPECT_TRUE(list_adapters(stacked).back().by_location.empty());
}

TEST(Train, WhatIsFrozenIsNamedWithItsRemedy) {
  const auto module = compose(two_fused(), "stacked", composition_from_string("Stack(a, b)"));
  const auto has = [](const std::string& error, const std::string& text) {
    EXPECT_NE(error.find(text), std::string::npos) << error;
  };
  has(error_of([&] { trainable_parameters(module, "a"); }),
      "trainable_parameters: 'a' is frozen; graft or load it as a trainable adapter, or call unfreeze_adapter");
  has(error_of([&] { trainable_parameters(module, "both"); }),
      "trainable_parameters: 'both', Fuse(a, b), is frozen; call unfreeze_adapter('both') to train its");
  has(error_of([&] { trainable_parameters(module, "stacked"); }),
      "trainable_parameters: 'stacked', Stack(a, b), is frozen, for its adapters are; call unfreeze_adapter for one of "
      "a, b");
  has(error_of([&] { fusion_regularization_loss(module, "both"); }),
      "fusion_regularization_loss: 'both', Fuse(a, b), is frozen");
  EXPECT_EQ(trainable_parameters(unfreeze_adapter(module, "both"), "both").size(), 2u * 5);  // as they say
  has(error_of([&] { unfreeze_adapter(module, "a"); }),
      "unfreeze_adapter: the composition 'both', Fuse(a, b), has a Fuse and uses 'a', and the adapters of such a "
      "composition stay frozen; remove the composition first");
  EXPECT_FALSE(trainable_parameters(unfreeze_adapter(remove_adapters(module, {"both"}), "a"), "stacked").empty());
}

TEST(Train, AFusionConfigThatACallerFilledIsChecked) {
  const auto module = two_fused();
  const StateDict weights = {};
  for (const auto& [message, change] :
       {std::pair<std::string, std::function<void(FusionConfig&)>>(
            "temperature=true is not supported", [](FusionConfig& config) { config.temperature = true; }),
        {"expected dropout_prob to be at least 0 and below 1, got 1",
         [](FusionConfig& config) { config.dropout_prob = 1.0; }},
        {"below 1, got nan", [](FusionConfig& config) { config.dropout_prob = std::nan(""); }}}) {
    FusionConfig config;
    config.name = "x";
    change(config);
    const Composition fuse = composition_from_string("Fuse(a, b, name='x')");
    for (const std::string& error : {error_of([&] { add_adapter_fusion(module, fuse, config); }),
                                     error_of([&] { load_adapter_fusion(module, config, weights); })}) {
      EXPECT_NE(error.find(message), std::string::npos) << error;
    }
  }
}

TEST(Train, FreezingAndUnfreezingEjectPrefixesAndKeepTheResult) {
  const auto module = graft(encoder(), {spec("a", "mam", true)});
  const at::Tensor x = at::randn({2, 5, 12});
  const auto frozen = freeze_adapter(module, "a");
  EXPECT_LT(largest_difference(run(frozen, x), run(module, x)), 1e-6);
  EXPECT_GT(list_adapters(module)[0].by_location.at("self_prefix"),
            list_adapters(frozen)[0].by_location.at("self_prefix"));  // the MLP is larger than the prefixes it makes
  EXPECT_NE(error_of([&] { trainable_parameters(frozen, "a"); }).find("'a' is frozen"), std::string::npos);
  EXPECT_NE(error_of([&] { trainable_parameters(frozen, "z"); }).find("there are: a"), std::string::npos);
  const auto again = unfreeze_adapter(frozen, "a");
  EXPECT_LT(largest_difference(run(again, x), run(module, x)), 1e-6);
  EXPECT_EQ(trainable_parameters(again, "a").size(), 2u * (2 + 4));  // keys and values; a bottleneck's four
}

TEST(Train, ASingleTrainableAdapterHasItsParametersInNoBank) {
  const auto module = graft(encoder(), {spec("a", "lora", true)});
  const auto layer = module.attr("adapters").toModule().attr("layer_0").toModule();
  const auto slot = layer.attr("selfattn_lora_q").toModule();
  EXPECT_FALSE(slot.hasattr("lora_a"));
  EXPECT_TRUE(slot.hasattr("scaling"));
  EXPECT_TRUE(slot.attr(own_module_name("a")).toModule().hasattr("lora_a"));
}

TEST(Head, SaveAndLoadAdapterKeepItsHead) {
  HeadConfig config;
  config.num_labels = 3;
  config.pooling = "mean";
  config.label2id = {{"bad", 0}, {"fair", 1}, {"good", 2}};
  auto module = add_head(graft(encoder(), {spec("a", "unipelt", true)}), "a", config);
  const at::Tensor x = at::randn({2, 5, 12});
  const at::Tensor expected = module.get_method("forward_with_head")({x}).toTensor();
  EXPECT_EQ(expected.sizes(), at::IntArrayRef({2, 3}));
  const auto directory = (std::filesystem::temp_directory_path() / "torchgraft_test_head").string();
  std::filesystem::remove_all(directory);
  save_adapter(module, "a", directory);
  std::ofstream(directory + "/pytorch_adapter.bin") << "of an older adapter: the library would read it";
  save_adapter(module, "a", directory);
  EXPECT_FALSE(std::filesystem::exists(directory + "/pytorch_adapter.bin"));
  auto loaded = load_adapter(encoder(), directory, "b");
  EXPECT_LT(largest_difference(loaded.get_method("forward_with_head")({x}).toTensor(), expected), 1e-6);
  EXPECT_EQ(head_config_from_json(head_config(loaded, "b")).label2id, config.label2id);
  std::filesystem::remove(directory + "/model_head.safetensors");
  EXPECT_NE(error_of([&] { load_adapter(encoder(), directory, "b"); }).find("no model_head.safetensors"),
            std::string::npos);
  std::filesystem::remove_all(directory);
}

TEST(Head, UnsupportedHeadsAreNamed) {
  const auto module = graft(encoder(), {spec("a", "lora", false)});
  HeadConfig config;
  config.use_pooler = true;
  EXPECT_NE(error_of([&] { add_head(module, "a", config); }).find("use_pooler=True"), std::string::npos);
  EXPECT_NE(error_of([&] { add_head(module, "a", HeadConfig{}, "lengths"); }).find("no Tensor argument 'lengths'"),
            std::string::npos);
  EXPECT_NE(error_of([&] { head_config_from_json("{}"); }).find("an object \"config\""), std::string::npos);
}

}  // namespace
}  // namespace torchgraft
