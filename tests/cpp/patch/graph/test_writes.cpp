#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/ir/irparser.h>

#include <algorithm>
#include <string>
#include <utility>

namespace torchgraft {
namespace {

using testing::make_module;
using torch::jit::Node;
using torch::jit::Value;

// `y` may be the memory of `z`, which add_ writes into: a dropout that drops nothing returns its operand.
constexpr const char* kForward = R"python(
def forward(self, x: Tensor):
    y = x * 2
    z = torch.dropout(y, 0.1, False)
    other = x * 3
    z.add_(1)
    return torch.neg(y), torch.neg(other), z
)python";

class WritesOfAGraph : public ::testing::Test {
 protected:
  WritesOfAGraph() : graph_(make_module({}, kForward).get_method("forward").graph()->copy()), writes_(graph_) {}

  std::vector<Node*> nodes(const char* name) {
    std::vector<Node*> found;
    for_each_node(graph_->block(), [&](Node* node) {
      if (is_aten(node, {name})) {
        found.push_back(node);
      }
    });
    return found;
  }

  std::shared_ptr<torch::jit::Graph> graph_;
  Writes writes_;
};

TEST_F(WritesOfAGraph, ReachWhatMayShareMemory) {
  EXPECT_TRUE(writes_.reach(nodes("dropout")[0]->output()));
  EXPECT_TRUE(writes_.reach(nodes("mul")[0]->output()));
  EXPECT_FALSE(writes_.reach(nodes("mul")[1]->output()));
}

TEST_F(WritesOfAGraph, AreFoundBetweenTwoNodes) {
  Node* writer = nodes("add")[0];
  Node* reader = nodes("neg")[0];
  Value* y = nodes("mul")[0]->output();
  Value* other = nodes("mul")[1]->output();
  EXPECT_EQ(writes_.between(nodes("dropout")[0], reader, {y}), writer);
  EXPECT_EQ(writes_.between(nodes("dropout")[0], reader, {other}), nullptr);
  EXPECT_EQ(writes_.between(nodes("dropout")[0], writer, {y}), nullptr);
  EXPECT_EQ(writes_.between(writer, reader, {y}), nullptr);
}

TEST(Writes, AListThatTakesATensorDoesNotChangeIt) {
  const auto graph = make_module({}, R"python(
def forward(self, x: Tensor, kept: List[Tensor]):
    y = x * 2
    kept.append(y)
    return torch.neg(y)
)python")
                         .get_method("forward")
                         .graph()
                         ->copy();
  Node* made = nullptr;
  Node* kept = nullptr;
  Node* reader = nullptr;
  for_each_node(graph->block(), [&](Node* node) {
    made = is_aten(node, {"mul"}) ? node : made;
    kept = is_aten(node, {"append"}) ? node : kept;
    reader = is_aten(node, {"neg"}) ? node : reader;
  });
  const Writes writes(graph);
  EXPECT_FALSE(writes.reach(made->output()));
  EXPECT_EQ(writes.between(made, reader, {made->output()}), nullptr);
  EXPECT_EQ(writes.between(made, reader, {graph->inputs()[2]}), kept);
}

// A list that the graph made itself is not given, but one that it holds may be.
TEST(Writes, KnowWhoseContainerChanges) {
  const std::pair<const char*, bool> changes[] = {{"past[0] = x", true},
                                                  {"past.append(x)", true},
                                                  {"past.reverse()", true},
                                                  {"nested[0].append(x)", true},
                                                  {"named['a'] = x", true},
                                                  {"own = [x]\n    own[0] = x", false},
                                                  {"own = [past]\n    own[0].append(x)", true},
                                                  {"own = {'a': x}\n    own['a'] = x", false},
                                                  {"x.add_(past[0])", false}};
  for (const auto& [line, changed] : changes) {
    SCOPED_TRACE(line);
    const auto module = make_module({}, std::string(R"python(
def forward(self, x: Tensor, past: List[Tensor], nested: List[List[Tensor]], named: Dict[str, Tensor]):
    )python") + line + "\n    return x\n");
    const auto graph = module.get_method("forward").graph();
    bool found = false;
    for_each_node(graph->block(), [&](Node* node) { found = found || changes_given_container(node); });
    EXPECT_EQ(found, changed) << *graph;
  }
}

// Whatever was there before a tensor was made does not change with it, though a list that both may be in hides that
// from AliasDb. In a loop, what is made behind a reader is there before it in the next round.
TEST(Writes, WhatIsOlderThanWhatIsWrittenStays) {
  const std::pair<const char*, bool> bodies[] = {{R"python(
    y = torch.neg(x)
    made = torch.zeros_like(x, dtype=4)
    made[0] = 1
    return y[[made]])python",
                                                  false},
                                                 {R"python(
    y = torch.neg(x)
    made = torch.zeros_like(x, dtype=4)
    made[0].add_(1)
    x[[made]].add_(1)
    x.view(-1).mul_(2)
    return y)python",
                                                  true},
                                                 {R"python(
    y = torch.neg(x)
    for i in range(3):
        y = torch.neg(x.view(-1))
        made = torch.zeros_like(x, dtype=4)
        made.add_(1)
        x = made
    return y)python",
                                                  true}};
  for (const auto& [body, is_reached] : bodies) {
    SCOPED_TRACE(body);
    const std::string source = std::string("\ndef forward(self, x: Tensor):") + body + "\n";
    const auto graph = make_module({}, source).get_method("forward").graph()->copy();
    const Writes writes(graph);
    bool found = writes.reach(graph->inputs()[1]);
    for_each_node(graph->block(),
                  [&](Node* node) { found = found || (is_aten(node, {"view"}) && writes.reach(node->output())); });
    EXPECT_EQ(found, is_reached) << *graph;
  }
}

TEST(Writes, AnOlderListMayHoldWhatIsWritten) {
  const auto graph = make_module({}, R"python(
def forward(self, x: Tensor):
    kept = [x]
    made = torch.zeros_like(x)
    kept.append(made)
    made.add_(1)
    return torch.cat(kept)
)python")
                         .get_method("forward")
                         .graph()
                         ->copy();
  Node* list = nullptr;
  Node* writer = nullptr;
  Node* reader = nullptr;
  for_each_node(graph->block(), [&](Node* node) {
    list = node->kind() == c10::prim::ListConstruct ? node : list;
    writer = is_aten(node, {"add"}) ? node : writer;
    reader = is_aten(node, {"cat"}) ? node : reader;
  });
  EXPECT_EQ(Writes(graph).between(writer->prev(), reader, {list->output()}), writer);
}

// Of lists of tensors, as an exported program has them, aten::index is composed of others, and copies nevertheless.
TEST(Writes, WhatIsIndexedIsACopy) {
  const auto graph = std::make_shared<torch::jit::Graph>();
  torch::jit::parseIR(R"IR(
graph(%x : Tensor, %index : Tensor):
  %one : int = prim::Constant[value=1]()
  %indices : Tensor[] = prim::ListConstruct(%index)
  %chosen : Tensor = aten::index(%x, %indices)
  %written : Tensor = aten::add_(%index, %one, %one)
  return (%chosen, %written))IR",
                      graph.get());
  const Writes writes(graph);
  for_each_node(graph->block(), [&](Node* node) {
    if (is_aten(node, {"index"})) {
      EXPECT_STREQ(node->schema().overload_name().c_str(), "Tensor_hacked_twin");
      EXPECT_FALSE(writes.reach(node->output()));
    }
  });
}

}  // namespace
}  // namespace torchgraft
