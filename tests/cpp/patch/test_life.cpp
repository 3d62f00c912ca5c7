#include "encoder.h"

#include <torchgraft/patch/graph/whole_graphs.h>
#include <torchgraft/patch/life.h>
#include <torchgraft/patch/module/verify_change.h>
#include <torchgraft/patch/save_adapter.h>
#include <torchgraft/patch/verify.h>

#include <gtest/gtest.h>

#include <filesystem>

namespace torchgraft {
namespace {

using testing::encoder;
using testing::error_of;
using testing::largest_difference;

at::Tensor run(torch::jit::Module module, const at::Tensor& x) {
  at::NoGradGuard no_grad;
  return module.forward({x}).toTensor();
}

AdapterSpec spec(const std::string& name, const std::string& config) {
  return {name, config_from_string(config), std::nullopt, ""};
}

// Draws the matrices and prefixes in all banks from a normal distribution.
torch::jit::Module randomised(torch::jit::Module module) {
  at::NoGradGuard no_grad;
  for (at::Tensor parameter : module.attr("adapters").toModule().parameters()) {
    if (parameter.is_floating_point() && parameter.dim() > 2) {
      parameter.normal_();
    }
  }
  return module;
}

TEST(Life, RemovingAndRenamingKeepsTheActiveAdaptersResult) {
  auto module = randomised(graft(encoder(), {spec("a", "lora"), spec("b", "unipelt")}));
  const at::Tensor x = at::randn({2, 5, 12});
  const at::Tensor expected = run(module, x);
  const auto smaller = rename_adapter(remove_adapters(module, {"a"}), "b", "c");
  const auto infos = list_adapters(smaller);
  ASSERT_EQ(infos.size(), 1u);
  EXPECT_EQ(infos[0].name, "c");
  EXPECT_TRUE(infos[0].active);
  EXPECT_LT(largest_difference(run(smaller, x), expected), 1e-5);
  EXPECT_NE(error_of([&] { remove_adapters(module, {"z"}); }).find("there are: a, b"), std::string::npos);
}

TEST(Life, UngraftGivesTheMergedModelAndAfterUnmergingTheBase) {
  auto base = encoder();
  const auto module = randomised(graft(base, {spec("a", "lora[attn_matrices=['q', 'k', 'v'], output_lora=True]")}));
  const at::Tensor x = at::randn({2, 5, 12});
  const at::Tensor plain = run(base, x);
  const auto merged = merge_adapter(module, "a");
  EXPECT_LT(largest_difference(run(ungraft(merged), x), run(module, x)), 1e-4);
  EXPECT_LT(largest_difference(run(ungraft(unmerge_adapter(merged, "a")), x), plain), 1e-4);
  EXPECT_TRUE(at::equal(run(base, x), plain));
  EXPECT_GT(largest_difference(run(module, x), plain), 1e-2);
}

TEST(Life, AChangeThatMovesAResultThrows) {
  const auto module = randomised(graft(encoder(), {spec("a", "lora"), spec("b", "lora")}));
  const std::optional<std::vector<c10::IValue>> example{{at::randn({2, 5, 12})}};
  const auto text = [&](const char* method, const std::string& adapter) {
    return error_of([&] {
      EXPECT_EQ(
          verify_change(module, {{{module, "forward", "a"}, {module, method, adapter}, "b"}}, example, {"change"}), "");
    });
  };
  EXPECT_EQ(text("forward", "a"), "");
  EXPECT_NE(text("forward", "b").find("change: on example inputs the result of b is another"), std::string::npos);
  EXPECT_NE(text("base_forward", "").find("change: on example inputs"), std::string::npos);
  EXPECT_EQ(verify(module, example), std::vector<std::string>());
  EXPECT_NE(error_of([&] { verify(encoder()); }).find("the module has no adapters"), std::string::npos);
}

TEST(Life, MergingABottleneckThrowsAndChangesNothing) {
  auto base = encoder();
  const at::Tensor x = at::randn({2, 5, 12});
  const auto module = randomised(graft(base, {spec("a", "lora|seq_bn")}));
  const at::Tensor expected = run(module, x);
  EXPECT_NE(error_of([&] { merge_adapter(module, "a"); }).find("a bottleneck adapter has a non-linearity"),
            std::string::npos);
  EXPECT_TRUE(at::equal(run(module, x), expected));
}

TEST(Life, LowerGivesTheSameResultsWithoutTorchgraftsOps) {
  const auto module = randomised(graft(encoder(), {spec("a", "unipelt"), spec("b", "mam")}));
  const auto lowered = lower(module);
  const at::Tensor x = at::randn({2, 5, 12});
  EXPECT_LT(largest_difference(run(lowered, x), run(module, x)), 1e-4);
  for (const char* op : {"gated_lora", "gated_bottleneck", "gated_prefix_attention"}) {
    EXPECT_EQ(testing::count_kind(*whole_graph(lowered, "grafted_forward"), std::string("torchgraft::") + op), 0u);
  }
}

TEST(Life, LoadAdapterLeavesTheServingModuleAloneAndNamesDamagedFiles) {
  const std::string folder = std::string(::testing::TempDir()) + "/saved_adapter";
  auto base = encoder();
  const auto source = randomised(graft(base, {spec("a", "unipelt")}));
  save_adapter(source, "a", folder);
  const auto serving = graft(base, {spec("first", "lora")});
  const at::Tensor x = at::randn({2, 5, 12});
  auto next = load_adapter(serving, folder);
  EXPECT_EQ(next.get_method("active_adapter")({}).toStringRef(), "first");
  next.get_method("activate")({"a"});
  EXPECT_LT(largest_difference(run(next, x), run(source, x)), 1e-5);
  EXPECT_EQ(list_adapters(serving).size(), 1u);

  std::filesystem::resize_file(folder + "/adapter.safetensors", 100);
  EXPECT_NE(error_of([&] { load_adapter(serving, folder); }).find("truncated"), std::string::npos);
  std::filesystem::remove(folder + "/adapter_config.json");
  EXPECT_NE(error_of([&] { load_adapter(serving, folder); }).find("adapter_config.json"), std::string::npos);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace torchgraft
