#include "support.h"

#include <torchgraft/patch/canonicalise/inline_calls.h>
#include <torchgraft/patch/canonicalise/merge_twin_branches.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// A layer with the weights `w` and `v` [6, 6]. `body` is that of forward(x [2, 5, 6], mask, flag).
torch::jit::Module module_of(const std::string& body) {
  at::manual_seed(0);
  return make_module({{"w", at::randn({6, 6})}, {"v", at::randn({6, 6})}}, R"python(
def apply(self, x: Tensor, w: Tensor, v: Tensor, mask: Optional[Tensor], causal: bool) -> Tensor:
    y = torch.linear(x, w)
    if mask is not None:
        y = y + mask
    if causal:
        y = torch.tril(y)
    return torch.linear(torch.tanh(y), v) + x

def layer(self, x: Tensor, mask: Optional[Tensor], causal: bool) -> Tensor:
    return self.apply(x, self.w, self.v, mask, causal)

def other_layer(self, x: Tensor, mask: Optional[Tensor], causal: bool) -> Tensor:
    return self.apply(x, self.v, self.w, mask, causal)

def forward(self, x: Tensor, mask: Optional[Tensor], flag: bool) -> Tensor:
)python" + body);
}

std::shared_ptr<torch::jit::Graph> merged(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  inline_calls(graph, [](torch::jit::Node*) { return false; });
  merge_twin_branches(graph);
  graph->lint();
  return graph;
}

void expect_same_results(const torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph) {
  at::manual_seed(1);
  const at::Tensor x = at::randn({2, 5, 6});
  const at::Tensor mask = at::randn({5, 6});
  for (const bool flag : {false, true}) {
    for (const c10::IValue& given : {c10::IValue(), c10::IValue(mask)}) {
      const at::Tensor expected = torch::jit::Module(module).forward({x, given, flag}).toTensor();
      const at::Tensor actual = run_graph(module, graph, {x, given, flag}).toTensor();
      EXPECT_EQ(largest_difference(expected, actual), 0.0) << "flag " << flag << ", mask " << !given.isNone();
    }
  }
}

struct Case {
  const char* name;
  const char* body;
  size_t linears;  // left in the graph
};

class MergeTwinBranches : public ::testing::TestWithParam<Case> {};

TEST_P(MergeTwinBranches, ComputesTheSame) {
  const auto module = module_of(GetParam().body);
  const auto graph = merged(module);
  EXPECT_EQ(count_kind(*graph, "aten::linear"), GetParam().linears);
  expect_same_results(module, graph);
}

INSTANTIATE_TEST_SUITE_P(Twins, MergeTwinBranches,
                         ::testing::Values(Case{"other_arguments", R"python(
    if mask is not None or flag:
        x = self.layer(self.layer(x, mask, flag), mask, flag)
    else:
        x = self.layer(self.layer(x, None, False), None, False)
    return x
)python",
                                                4},
                                           Case{"same_arguments", R"python(
    if flag:
        return self.layer(x, mask, True)
    return self.layer(x, mask, True)
)python",
                                                2},
                                           Case{"other_inputs", R"python(
    y = x * 2.0
    if flag:
        x = self.layer(x, mask, False)
    else:
        x = self.layer(y, mask, False)
    return x
)python",
                                                2},
                                           Case{"nested", R"python(
    if flag:
        if mask is not None:
            x = self.layer(x, mask, True)
        else:
            x = self.layer(x, None, True)
    else:
        if mask is not None:
            x = self.layer(x, mask, False)
        else:
            x = self.layer(x, None, False)
    return x
)python",
                                                2}),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(NoTwins, MergeTwinBranches,
                         ::testing::Values(Case{"other_weights", R"python(
    if flag:
        x = self.layer(x, mask, False)
    else:
        x = self.other_layer(x, mask, False)
    return x
)python",
                                                4},
                                           Case{"another_step", R"python(
    if flag:
        x = self.layer(x, mask, False)
    else:
        x = torch.sin(self.layer(x, mask, False))
    return x
)python",
                                                4},
                                           Case{"once_and_twice", R"python(
    if flag:
        x = self.layer(x, mask, False)
    else:
        x = self.layer(self.layer(x, mask, False), mask, False)
    return x
)python",
                                                6},
                                           Case{"other_wiring", R"python(
    if flag:
        y = torch.linear(x, self.w)
        z = torch.sin(y)
        x = y - z
    else:
        y = torch.linear(x, self.w)
        z = torch.sin(y)
        x = z - y
    return x
)python",
                                                2},
                                           Case{"skipped", R"python(
    if flag:
        x = self.layer(x, mask, False)
    return x
)python",
                                                2}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
