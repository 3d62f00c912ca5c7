#include "support.h"

#include <torchgraft/patch/canonicalise/unpacked_results.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// The tensors in `value`, in order.
void add_tensors(const c10::IValue& value, std::vector<at::Tensor>& result) {
  if (value.isTensor()) {
    result.push_back(value.toTensor());
    return;
  }
  for (const c10::IValue& item : value.isTuple() ? value.toTupleRef().elements().vec() : value.toListRef().vec()) {
    add_tensors(item, result);
  }
}

struct Case {
  const char* name;
  const char* body;
  size_t values;  // that the graph returns while its result is unpacked
};

class UnpackedResultsOf : public ::testing::TestWithParam<Case> {};

TEST_P(UnpackedResultsOf, AreThoseOfTheGraph) {
  auto module = make_module({}, std::string("def forward(self, x: Tensor, y: Tensor):\n") + GetParam().body);
  const auto before = module.get_method("forward").graph();
  const auto after = before->copy();
  {
    const UnpackedResults unpacked(after);
    after->lint();
    EXPECT_EQ(after->outputs().size(), GetParam().values) << *after;
  }
  after->lint();
  ASSERT_EQ(after->outputs().size(), 1U);
  EXPECT_EQ(*after->outputs()[0]->type(), *before->outputs()[0]->type());
  const std::vector<c10::IValue> inputs = {at::randn({2}), at::randn({2})};
  std::vector<at::Tensor> expected;
  std::vector<at::Tensor> actual;
  add_tensors(run_graph(module, before, inputs), expected);
  add_tensors(run_graph(module, after, inputs), actual);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(largest_difference(actual[i], expected[i]), 0.0) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Results, UnpackedResultsOf,
    ::testing::Values(Case{"a_tensor", "    return x + y\n", 1}, Case{"a_tuple", "    return x + y, [y, x]\n", 3},
                      Case{"lists_in_a_tuple", "    return [x, y], [(y, x)]\n", 4},
                      Case{"a_tensor_twice", "    return x, [x, y, x]\n", 4},
                      Case{"a_list_twice", "    l = [y, x]\n    return l, l\n", 2},
                      Case{"a_tuple_twice", "    t = (y, x)\n    return t, t\n", 2},
                      Case{"twice_in_a_list", "    t = (y, x)\n    return [t, t], x\n", 3},
                      Case{"also_deeper", "    t = (y, x)\n    return t, [t, t]\n", 3},
                      Case{"first_deeper", "    t = (y, x)\n    return [t], t\n", 2},
                      Case{"a_list_that_grows", "    l = [y]\n    l.append(x)\n    return l, x\n", 2}),
    [](const auto& info) { return info.param.name; });

TEST(UnpackedResults, AListThatIsReturnedTwiceStaysOne) {
  auto module = make_module({}, "def forward(self, x: Tensor):\n    l = [x]\n    return l, l\n");
  const auto graph = module.get_method("forward").graph()->copy();
  {
    const UnpackedResults unpacked(graph);
  }
  const c10::IValue result = run_graph(module, graph, {at::ones({1})});
  EXPECT_TRUE(result.toTupleRef().elements()[0].is(result.toTupleRef().elements()[1]));
}

}  // namespace
}  // namespace torchgraft
