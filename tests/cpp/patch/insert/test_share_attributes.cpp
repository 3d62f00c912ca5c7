#include <torchgraft/patch/insert/share_attributes.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/testing/file_check.h>

namespace torchgraft {
namespace {

torch::jit::Module module_with_adapters(const std::string& forward) {
  torch::jit::Module adapters("Adapters");
  adapters.register_attribute("active", c10::IntType::get(), 0);
  torch::jit::Module module("Grafted");
  module.register_module("adapters", adapters);
  module.register_attribute("calls", c10::IntType::get(), 0);
  module.define(forward);
  return module;
}

std::shared_ptr<torch::jit::Graph> shared(const torch::jit::Module& module) {
  const auto graph = module.get_method("forward").graph()->copy();
  share_attributes(*graph);
  graph->lint();
  return graph;
}

TEST(ShareAttributes, ABranchReadsWhatStandsAboveIt) {
  const auto graph = shared(module_with_adapters(R"python(
def forward(self, x: Tensor, flag: bool) -> Tensor:
    x = x + self.adapters.active
    if flag:
        x = x * self.adapters.active
    return x - self.adapters.active
)python"));
  torch::jit::testing::FileCheck().check_count("prim::GetAttr", 2, /*exactly=*/true)->run(*graph);
}

TEST(ShareAttributes, WhatABranchReadsItsNeighbourReadsItself) {
  const auto graph = shared(module_with_adapters(R"python(
def forward(self, x: Tensor, flag: bool) -> Tensor:
    if flag:
        x = x + self.adapters.active
    else:
        x = x * self.adapters.active
    return x - self.adapters.active
)python"));
  torch::jit::testing::FileCheck().check_count("prim::GetAttr[name=\"active\"]", 3, /*exactly=*/true)->run(*graph);
}

TEST(ShareAttributes, TheBasesAttributesMayBeAssignedBetweenTwoReads) {
  const auto graph = shared(module_with_adapters(R"python(
def forward(self, x: Tensor) -> Tensor:
    x = x + self.calls
    self.calls = self.calls + 1
    return x + self.calls
)python"));
  torch::jit::testing::FileCheck().check_count("prim::GetAttr", 3, /*exactly=*/true)->run(*graph);
}

}  // namespace
}  // namespace torchgraft
