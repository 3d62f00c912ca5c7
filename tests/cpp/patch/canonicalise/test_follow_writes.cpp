#include "support.h"

#include <torchgraft/patch/canonicalise/follow_writes.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* body;
  bool follows;  // whether the result is computed from `new` by data flow alone
};

// Whether `value` is computed from `source`, as data flow shows it.
bool is_computed_from(const torch::jit::Value* value, const torch::jit::Value* source) {
  const auto inputs = value->node()->inputs();
  return value == source ||
         std::any_of(inputs.begin(), inputs.end(), [&](auto* input) { return is_computed_from(input, source); });
}

class FollowWrites : public ::testing::TestWithParam<Case> {};

TEST_P(FollowWrites, KeepsResultsAndWhatIsWritten) {
  auto module = make_module({{"kept", at::zeros({2, 6, 4})}},
                            std::string("def forward(self, cache: Tensor, new: Tensor, i: int):\n") + GetParam().body);
  const auto before = module.get_method("forward").graph();
  const auto after = before->copy();
  follow_writes(after);
  after->lint();
  EXPECT_EQ(is_computed_from(after->outputs()[0], after->inputs()[2]), GetParam().follows) << *after;
  at::manual_seed(0);
  const at::Tensor cache = at::randn({2, 6, 4});
  const at::Tensor tokens = at::randn({2, 3, 4}, at::kDouble);  // a write casts
  for (const int64_t begin : {0, 2, 3}) {
    const at::Tensor left = cache.clone();
    const at::Tensor right = cache.clone();
    const at::Tensor expected = run_graph(module, before, {left, tokens, begin}).toTensor().clone();
    module.attr("kept").toTensor().zero_();
    EXPECT_EQ(largest_difference(run_graph(module, after, {right, tokens, begin}).toTensor(), expected), 0.0);
    EXPECT_EQ(largest_difference(right, left), 0.0);
    module.attr("kept").toTensor().zero_();
  }
}

INSTANTIATE_TEST_SUITE_P(Followed, FollowWrites,
                         ::testing::Values(Case{"slice", R"(
    cache[:, i:i + 3] = new
    return cache[:, :i + 3] * 2
)",
                                                true},
                                           Case{"index_copy", R"(
    cache.index_copy_(1, torch.arange(i, i + 3), new.float())
    return cache.transpose(0, 1) * 2
)",
                                                true},
                                           Case{"twice", R"(
    cache[:, i:i + 3] = new
    cache[:, 0:3] = new * 2
    return cache + 0
)",
                                                true},
                                           Case{"broadcast", R"(
    cache[:, i:i + 1] = new[0, 0]
    return cache + 0
)",
                                                true},
                                           Case{"negative_bounds", R"(
    cache[:, -3:] = new
    return cache + 0
)",
                                                true},
                                           Case{"part_of_the_cache", R"(
    cache[0, i:i + 3] = new[0]
    return cache[0] + 0
)",
                                                true},
                                           Case{"attribute", R"(
    self.kept[:, i:i + 3] = new
    return self.kept + 0
)",
                                                true},
                                           Case{"another_part", R"(
    cache[0, i:i + 3] = new[0]
    return cache[1] + 0
)",
                                                false},
                                           Case{"read_before", R"(
    y = cache + 0
    cache[:, i:i + 3] = new
    return y
)",
                                                false},
                                           Case{"view_taken_before", R"(
    y = cache[:, :i + 3]
    cache[:, i:i + 3] = new
    return y + 0
)",
                                                false}),
                         [](const auto& info) { return info.param.name; });

// What a list holds, written and read again, when something else is put into the list in between.
TEST(FollowWrites, AnElementThatIsReplacedIsNotTheWrittenOne) {
  const std::pair<const char*, const char*> changes[] = {
      {"nothing", "n = 0"}, {"an_element", "past[0] = other"}, {"the_order", "past.reverse()"}};
  const std::pair<const char*, const char*> reads[] = {{"unpacked", "a, c = past\n"},
                                                       {"by_index", "a = past[0]\n    c = past[1]\n"}};
  for (const auto& [change, line] : changes) {
    for (const auto& [way, read] : reads) {
      SCOPED_TRACE(std::string(change) + ", " + way);
      auto module = make_module({}, std::string(R"(
def forward(self, past: List[Tensor], other: Tensor, y: Tensor, i: Tensor):
    )") + read + "    a.index_copy_(1, i, y)\n    " +
                                        line + "\n    " + read + "    return a * 2 + c\n");
      const auto before = module.get_method("forward").graph();
      const auto after = before->copy();
      follow_writes(after);
      after->lint();
      EXPECT_EQ(is_computed_from(after->outputs()[0], after->inputs()[3]), std::string(change) == "nothing") << *after;
      const auto run = [&](const auto& graph) {
        at::manual_seed(0);
        const c10::List<at::Tensor> past({at::randn({2, 6, 4}), at::randn({2, 6, 4})});
        return run_graph(module, graph, {past, at::randn({2, 6, 4}), at::randn({2, 1, 4}), at::tensor({int64_t{3}})})
            .toTensor();
      };
      EXPECT_EQ(largest_difference(run(after), run(before)), 0.0);
    }
  }
}

}  // namespace
}  // namespace torchgraft
