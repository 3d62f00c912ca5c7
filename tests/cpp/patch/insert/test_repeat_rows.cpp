#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/insert/repeat_rows.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <memory>

// A graph whose rows a Parallel of two repeats: at its top, or before its only adapter, which adds a row's id to it.
namespace torchgraft {
namespace {

using testing::largest_difference;
using testing::make_module;
using testing::run_graph;
using torch::jit::Graph;
using torch::jit::Module;

constexpr int64_t kParallel = 1;  // its id; 0 is a plain adapter's

struct Repeated {
  Module module;
  std::shared_ptr<Graph> graph;

  at::Tensor operator()(const at::Tensor& x, const c10::IValue& other, const std::vector<int64_t>& ids) const {
    const c10::IValue given = ids.empty() ? c10::IValue() : c10::IValue(at::tensor(ids));
    return run_graph(module, graph, {x, other, given}).toTensor();
  }
  bool is_late() const { return graph->toString(false).find("before the first adapter") != std::string::npos; }
};

Module module_of(const std::string& body) {
  Module adapters("Adapters");
  adapters.register_attribute("training", c10::BoolType::get(), false);
  adapters.register_attribute("active", c10::IntType::get(), -1);
  Module module = make_module({{"weight", at::ones({3, 3})}}, "");
  module.register_module("adapters", adapters);
  module.define(
      "def forward(self, x: Tensor, other: Optional[Tensor], adapter_ids: Optional[Tensor]) -> Tensor:\n"
      "    h = torch.linear(x, self.weight)\n    rows = h.size(0)\n" +
      body +
      "    if adapter_ids is not None:\n        h = h + adapter_ids.view(-1, 1, 1)\n"
      "    return h.reshape(rows, -1)\n");
  return module;
}

Repeated repeated(const std::string& body, const std::vector<std::vector<c10::IValue>>& examples) {
  Repeated result{module_of(body), nullptr};
  result.graph = result.module.get_method("forward").graph()->copy();
  GraphSites sites;
  sites.structure.layers.emplace_back();
  sites.layers.emplace_back();
  for_each_node(result.graph->block(), [&](torch::jit::Node* node) {
    if (is_aten(node, {"linear"})) {
      sites.layers[0].query.node = node;
    }
  });
  RowRepeater repeat(*result.graph, sites, result.module);
  repeat({{"both", composition_from_string("Parallel(a, b)")}}, kParallel, examples);
  torch::jit::EliminateDeadCode(result.graph);
  result.graph->lint();
  return result;
}

// What `body` gives for these rows, with these ids.
void expect_rows(const Repeated& graph, const at::Tensor& x, const c10::IValue& other, const std::vector<int64_t>& ids,
                 const std::vector<int64_t>& index, const std::vector<int64_t>& wanted) {
  const at::Tensor plain = graph(x, other, std::vector<int64_t>(static_cast<size_t>(x.size(0)), 0));
  const at::Tensor expected = plain.index_select(0, at::tensor(index)) + at::tensor(wanted).view({-1, 1});
  const at::Tensor found = graph(x, other, ids);
  ASSERT_EQ(found.sizes(), expected.sizes());
  EXPECT_LE(largest_difference(found, expected), 1e-5);
}

const char* const kAdds = "    if other is not None:\n        h = h + other\n";

TEST(RepeatRows, RowsStandChildByChild) {
  const at::Tensor x = at::randn({3, 2, 3});
  for (const auto& examples : {std::vector<std::vector<c10::IValue>>{}, {{at::randn({2, 2, 3}), c10::IValue()}}}) {
    const Repeated graph = repeated(kAdds, examples);
    EXPECT_EQ(graph.is_late(), !examples.empty());
    expect_rows(graph, x, c10::IValue(), {1, 1, 1}, {0, 1, 2, 0, 1, 2}, {1, 1, 1, 1, 1, 1});
    expect_rows(graph, x, c10::IValue(), {-1, 1, 0}, {0, 1, 2, 1}, {-1, 1, 0, 1});
    expect_rows(graph, x, c10::IValue(), {-1, 0, 0}, {0, 1, 2}, {-1, 0, 0});
    expect_rows(graph, x.narrow(0, 0, 1), c10::IValue(), {1}, {0, 0}, {1, 1});
    // Inputs of another kind than the example's.
    expect_rows(graph, x, at::randn({3, 2, 3}), {1, -1, 1}, {0, 1, 2, 0, 2}, {1, -1, 1, 1, 1});
    expect_rows(graph, x, at::randn({1, 2, 3}), {1, -1, 1}, {0, 1, 2, 0, 2}, {1, -1, 1, 1, 1});
  }
}

TEST(RepeatRows, TheActiveCompositionRepeatsAllRows) {
  Repeated graph = repeated(kAdds, {{at::randn({2, 2, 3}), at::randn({2, 2, 3})}});
  EXPECT_TRUE(graph.is_late());
  const at::Tensor x = at::randn({3, 2, 3});
  const at::Tensor other = at::randn({3, 2, 3});
  const at::Tensor expected = graph(x, other, {1, 1, 1}) - 1;  // without the ids: the active one is that of all rows
  graph.module.attr("adapters").toModule().setattr("active", kParallel);
  EXPECT_LE(largest_difference(graph(x, other, {}), expected), 1e-5);
}

TEST(RepeatRows, WhatDependsOnTheBatchIsRepeatedAtTheTop) {
  const Repeated graph = repeated("    h = h - h.sum(0, keepdim=True)\n", {{at::randn({2, 2, 3}), c10::IValue()}});
  EXPECT_FALSE(graph.is_late());
}

TEST(RepeatRows, AnotherNumberOfIdsIsNamed) {
  const Repeated graph = repeated(kAdds, {});
  try {
    graph(at::randn({3, 2, 3}), c10::IValue(), {1, 1});
    FAIL() << "no error";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("one id for each of the batch's 3 rows"), std::string::npos);
  }
}

}  // namespace
}  // namespace torchgraft
