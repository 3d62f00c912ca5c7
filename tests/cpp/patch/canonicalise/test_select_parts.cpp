#include "support.h"

#include <torchgraft/patch/canonicalise/select_parts.h>
#include <torchgraft/patch/graph/graph_utils.h>

#include <gtest/gtest.h>

#include <algorithm>

namespace torchgraft {
namespace {

using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* body;
  bool apart;  // whether the result is computed without v
};

bool reads(const torch::jit::Value* value, const torch::jit::Value* source) {
  const auto inputs = value->node()->inputs();
  return value == source ||
         std::any_of(inputs.begin(), inputs.end(), [&](auto* input) { return reads(input, source); });
}

class SelectParts : public ::testing::TestWithParam<Case> {};

TEST_P(SelectParts, KeepsResultsAndSeparatesWhatIsStacked) {
  const auto module =
      make_module({{"w", at::randn({8, 8})}}, std::string("def forward(self, x: Tensor, v: Tensor, past: Tensor):\n"
                                                          "    k = torch.linear(x, self.w)\n"
                                                          "    v = v.view(v.size(0), v.size(1), 8)\n") +
                                                  GetParam().body);
  const auto before = module.get_method("forward").graph();
  const auto after = before->copy();
  torch::jit::Value* v = after->inputs()[2];
  select_parts(after, module);
  after->lint();
  EXPECT_EQ(!reads(after->outputs()[0], v), GetParam().apart) << *after;
  const std::vector<c10::IValue> inputs = {at::randn({3, 5, 8}), at::randn({3, 5, 8}), at::randn({2, 3, 4, 8})};
  EXPECT_EQ(
      largest_difference(run_graph(module, after, inputs).toTensor(), run_graph(module, before, inputs).toTensor()),
      0.0);
}

INSTANTIATE_TEST_SUITE_P(Stacked, SelectParts,
                         ::testing::Values(Case{"select", R"(
    return torch.stack([k, v])[0]
)",
                                                true},
                                           Case{"behind_cat", R"(
    return torch.cat([past, torch.stack([k, v])], 2)[0]
)",
                                                true},
                                           Case{"counted_from_the_end", R"(
    return torch.cat([past, torch.stack([k, v], -4)], -2).select(-4, -2)
)",
                                                true},
                                           Case{"along_the_same_dimension", R"(
    return torch.cat([past, torch.stack([k, v])], 2).select(2, 0)
)",
                                                false},
                                           Case{"written_in_place", R"(
    both = torch.stack([k, v])
    both.add_(v[0, 0, 0])
    return both[0]
)",
                                                false}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
