#include "encoder.h"

#include <torchgraft/patch/adapters/mean_adapter.h>
#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/graft.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/whole_graphs.h>
#include <torchgraft/patch/inspect.h>
#include <torchgraft/patch/module/drawn_weights.h>
#include <torchgraft/patch/module/verify_results.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/api/function_impl.h>

#include <limits>
#include <map>
#include <set>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using torch::jit::Module;

constexpr Verifier kTestVerifier = {"test", "; remedy"};

Module grafted(const Module& base, const std::vector<std::string>& names, const std::string& config = "lora[r=3]",
               bool trainable = false) {
  std::vector<AdapterSpec> specs;
  for (const std::string& name : names) {
    specs.push_back({name, config_from_string(config), std::nullopt, "", trainable});
  }
  GraftOptions options;
  options.verify = false;
  options.fuse = false;
  return graft(base, specs, options);
}

// Writes into row `adapter` of each bank of matrices.
void fill_row(const Module& module, int64_t adapter, const std::function<void(at::Tensor)>& fill) {
  at::NoGradGuard no_grad;
  for (const at::Tensor& bank : module.attr("adapters").toModule().parameters()) {
    if (bank.is_floating_point() && bank.dim() > 2) {
      fill(bank[adapter]);
    }
  }
  for (const at::Tensor& bank : module.attr("adapters").toModule().buffers()) {
    if (bank.is_floating_point() && bank.dim() > 2) {
      fill(bank[adapter]);
    }
  }
}

Module randomised_rows(const Module& module, int64_t adapters) {
  for (int64_t adapter = 0; adapter < adapters; ++adapter) {
    fill_row(module, adapter, [](at::Tensor row) { row.normal_(); });
  }
  return module;
}

std::string verified(const BaseAndGrafted& modules, const std::vector<std::string>& adapters,
                     const std::optional<BaseAndGrafted>& drawn = std::nullopt) {
  return verify_results(modules, drawn, {{at::randn({2, 5, 12})}}, at::TensorOptions(at::kFloat), adapters,
                        kTestVerifier);
}

void expect_text(const std::string& text, const std::string& beginning) {
  EXPECT_EQ(text.substr(0, beginning.size()), beginning);
  EXPECT_NE(text.find("; remedy"), std::string::npos) << text;
}

TEST(VerifyResults, EachEarlierAdapterIsCompared) {
  const std::vector<std::string> names = {"a", "b", "c", "d", "e"};
  const Module base = randomised_rows(grafted(encoder(), names), 5);
  EXPECT_EQ(verified({base, grafted(base, {"new"})}, {"new"}), "");
  for (int64_t changed = 0; changed < 5; ++changed) {
    const Module module = grafted(base, {"new"});
    fill_row(module, changed, [](at::Tensor row) { row.normal_(); });
    expect_text(error_of([&] { verified({base, module}, {"new"}); }),
                "test: on example inputs the result of rows of the adapters that the module has already differs from "
                "before ");
  }
}

TEST(VerifyResults, AnAdapterThatIsAnotherByItsIdsIsRefused) {
  const Module base = encoder();
  Module module = randomised_rows(grafted(base, {"a", "b"}), 2);
  EXPECT_EQ(verified({base, module}, {"a", "b"}), "");
  const auto graph = whole_graph(module, "grafted_forward");
  size_t changed = 0;
  for (torch::jit::Node* node : graph->nodes()) {
    if (std::string(node->kind().toQualString()) == "torchgraft::gated_lora") {
      const torch::jit::WithInsertPoint before(node);
      node->replaceInput(node->schema().argumentIndexWithName("adapter").value(), graph->insertConstant(0));
      ++changed;
    }
  }
  ASSERT_GT(changed, 0u);
  replace_whole_graph(module, "grafted_forward", graph);
  EXPECT_EQ(verified({base, module}, {"a"}), "");
  expect_text(error_of([&] { verified({base, module}, {"b"}); }),
              "test: on example inputs the result of 'b' by adapter_ids differs from the active adapter's ");
}

// A module that takes rows of different adapters only where it says so is right; one that fails otherwise is not.
TEST(VerifyResults, ABatchWithOneRowOfAnAdapterMayBeRefusedButNotFail) {
  const Module base = encoder();
  for (const auto& [message, passes] : std::initializer_list<std::pair<std::string, bool>>{
           {"rows of one batch cannot have different adapters in this model", true}, {"another error", false}}) {
    Module module = grafted(base, {"a"});
    const auto graph = whole_graph(module, "grafted_forward");
    const torch::jit::WithInsertPoint before(*graph->nodes().begin());
    const std::string source =
        "\ndef check(ids: Optional[Tensor]):\n    if ids is not None:\n        assert "
        "bool((ids == ids[0]).all()), '" +
        message + "'\n    return 0\n";
    torch::jit::insertGraph(*graph, *compile_graph(source, "check"), {graph->inputs().back()});
    replace_whole_graph(module, "grafted_forward", graph);
    SCOPED_TRACE(message);
    if (passes) {
      EXPECT_EQ(verified({base, module}, {"a"}), "");
    } else {
      const std::string text = error_of([&] { verified({base, module}, {"a"}); });
      EXPECT_NE(text.find("another error"), std::string::npos) << text;
    }
  }
}

TEST(VerifyResults, NumbersThatAreNotFiniteAreTheUsersOnlyWhereTheyAreNotDrawn) {
  const Module base = encoder();
  const Module module = grafted(base, {"a"});
  const Module broken = grafted(base, {"a"});
  fill_row(broken, 0, [](at::Tensor row) { row.fill_(std::numeric_limits<double>::infinity()); });
  const std::string reason = verified({base, module}, {"a"}, BaseAndGrafted{base, broken});
  EXPECT_NE(reason.find("weights that are zero were compared as they are"), std::string::npos) << reason;
  expect_text(error_of([&] { verified({base, broken}, {"a"}, BaseAndGrafted{base, module}); }),
              "test: the base's result on example inputs is finite, with the adapter it is not");
  expect_text(error_of([&] { verified({base, broken}, {"a"}); }),
              "test: the base's result on example inputs is finite, with the adapter it is not");
}

TEST(VerifyResults, AMeanWithOtherNumbersIsRefused) {
  const Module module = randomised_rows(grafted(encoder(), {"a", "b"}), 2);
  const std::vector<Adapter> sources = read_adapters(module.attr("adapters").toModule(), inspect(module));
  Adapter mean = mean_adapter(sources, {0.25, 0.75});
  check_is_mean(mean, sources, {0.25, 0.75});
  const std::string error = "average_adapter: lora_";
  EXPECT_EQ(error_of([&] { check_is_mean(mean, sources, {0.75, 0.25}); }).substr(0, error.size()), error);
  mean.weights.back().at("lora_b") = mean.weights.back().at("lora_b") * 1.001;
  EXPECT_EQ(error_of([&] { check_is_mean(mean, sources, {0.25, 0.75}); }).substr(0, error.size()), error);
}

// Of a module's weights by name.
std::map<std::string, at::Tensor> weights_of(const Module& module) {
  std::map<std::string, at::Tensor> result;
  for (const auto& parameter : module.named_parameters()) {
    result[parameter.name] = parameter.value.detach().clone();
  }
  for (const auto& buffer : module.named_buffers()) {
    result[buffer.name] = buffer.value.detach().clone();
  }
  return result;
}

// Draws, and returns the names of the weights that have other numbers then. The module keeps its own.
std::set<std::string> drawn_names(const Module& module) {
  const auto before = weights_of(module);
  const DrawnCopy drawn = with_drawn_weights(module);
  EXPECT_TRUE(drawn.has_drawn);
  EXPECT_FALSE(with_drawn_weights(drawn.module).has_drawn);
  std::set<std::string> result;
  for (const auto& [name, tensor] : weights_of(drawn.module)) {
    if (!at::equal(tensor, before.at(name))) {
      result.insert(name.substr(name.rfind('.') + 1));
      EXPECT_EQ(name.substr(0, 9), "adapters.");
    }
  }
  for (const auto& [name, tensor] : weights_of(module)) {
    EXPECT_TRUE(at::equal(tensor, before.at(name))) << name;
  }
  return result;
}

TEST(DrawnWeights, WeightsThatHideAnAdapterAreDrawn) {
  using Names = std::set<std::string>;
  EXPECT_EQ(drawn_names(grafted(encoder(), {"a", "b"})), Names({"lora_b"}));
  EXPECT_EQ(drawn_names(grafted(encoder(), {"a"}, "lora[r=3]", /*trainable=*/true)), Names({"lora_b"}));
  EXPECT_EQ(drawn_names(grafted(encoder(), {"a"}, "seq_bn[reduction_factor=3]")),
            Names({"down_bias", "up_bias"}));  // the matrices of "init_weights": "bert" are not zero
}

// Compacter computes its matrices from sources.
TEST(DrawnWeights, SourcesAreDrawn) {
  const Module module = grafted(encoder(), {"a"}, "compacter[reduction_factor=3]", /*trainable=*/true);
  at::NoGradGuard no_grad;
  std::set<std::string> zeroed;
  for (const auto& parameter : module.named_parameters()) {
    if (parameter.name.find("_source.") != std::string::npos) {
      parameter.value.zero_();
      zeroed.insert(parameter.name);
    }
  }
  ASSERT_FALSE(zeroed.empty());
  const auto drawn = weights_of(with_drawn_weights(module).module);
  for (const std::string& name : zeroed) {
    EXPECT_TRUE(drawn.at(name).all().item<bool>()) << name;
  }
}

// DoRA's norms depend on its LoRA, so that it gets another magnitude.
TEST(DrawnWeights, ADoraGetsAnotherMagnitude) {
  const Module module = grafted(encoder(), {"a"}, "lora[r=3, use_dora=True]");
  const auto before = weights_of(module);
  const DrawnCopy drawn = with_drawn_weights(module);
  EXPECT_TRUE(drawn.has_drawn);
  size_t magnitudes = 0;
  for (const auto& [name, tensor] : weights_of(drawn.module)) {
    const bool is_magnitude = name.ends_with(".magnitude");
    EXPECT_EQ(at::equal(tensor, before.at(name)), !is_magnitude) << name;
    magnitudes += is_magnitude;
  }
  EXPECT_GT(magnitudes, 0u);
}

// A large scaling must not drown the base in what is drawn.
TEST(DrawnWeights, WhatIsDrawnIsSmallWhereTheScalingIsLarge) {
  for (const bool trainable : {false, true}) {
    const Module module = grafted(encoder(), {"a"}, "lora[r=3, alpha=300000]", trainable);
    size_t drawn = 0;
    for (const auto& [name, tensor] : weights_of(with_drawn_weights(module).module)) {
      if (name.ends_with("lora_b") && tensor.numel() > 0 && tensor.any().item<bool>()) {
        EXPECT_LT(tensor.abs().max().item<double>(), 1e-4) << name;
        ++drawn;
      }
    }
    EXPECT_GT(drawn, 0u);
  }
}

}  // namespace
}  // namespace torchgraft
