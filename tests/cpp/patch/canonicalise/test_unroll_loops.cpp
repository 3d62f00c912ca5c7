#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/inline_calls.h>
#include <torchgraft/patch/canonicalise/unroll_loops.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// A loop over one layer with shared weights. The softmax in `attend` makes it a loop over attentions.
struct Case {
  const char* name;
  const char* body;
  size_t softmaxes;  // after unrolling; 1, inside the loop, when the loop must stay
};

torch::jit::Module module_of(const Case& test) {
  at::manual_seed(0);
  auto module = make_module({{"w", at::randn({6, 6}).requires_grad_()}}, "");
  module.register_attribute("runs", c10::IntType::get(), 3);
  module.define(std::string(R"python(
def attend(self, x: Tensor) -> Tensor:
    return x + torch.matmul(torch.softmax(torch.matmul(x, x.transpose(1, 2)), -1), torch.linear(x, self.w))

def forward(self, x: Tensor) -> Tensor:
)python") + test.body +
                "    return x\n");
  return module;
}

std::shared_ptr<torch::jit::Graph> unrolled(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  inline_calls(graph, [](torch::jit::Node*) { return false; });
  fold_attributes(graph, module);
  unroll_loops(graph);
  simplify(graph);
  graph->lint();
  return graph;
}

class UnrollLoops : public ::testing::TestWithParam<Case> {
 protected:
  // The result and the gradients of x and w.
  std::vector<at::Tensor> run(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph) {
    at::manual_seed(1);
    const at::Tensor x = at::randn({2, 5, 6}).requires_grad_();
    const at::Tensor out = run_graph(module, graph, {x}).toTensor();
    out.sin().sum().backward();
    at::Tensor weight = module.attr("w").toTensor();
    std::vector<at::Tensor> results = {out, x.grad(), weight.grad()};
    weight.mutable_grad() = at::Tensor();
    return results;
  }

  void expect_same_results(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph) {
    const auto expected = run(module, module.get_method("forward").graph());
    const auto actual = run(module, graph);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_LT(largest_difference(expected[i], actual[i]), 1e-6) << "of result " << i;
    }
  }
};

TEST_P(UnrollLoops, EachRunBecomesALayer) {
  auto module = module_of(GetParam());
  const auto graph = unrolled(module);
  EXPECT_EQ(count_kind(*graph, "prim::Loop"), 0u);
  EXPECT_EQ(count_kind(*graph, "prim::If"), 0u);
  EXPECT_EQ(count_kind(*graph, "aten::softmax"), GetParam().softmaxes);
  expect_same_results(module, graph);
}

INSTANTIATE_TEST_SUITE_P(Known, UnrollLoops,
                         ::testing::Values(Case{"by_attribute", R"python(
    for i in range(self.runs):
        x = self.attend(x)
)python",
                                                3},
                                           Case{"by_number", R"python(
    for i in range(1, 5):
        x = self.attend(x) * i
)python",
                                                4},
                                           Case{"by_list", R"python(
    for scale in [0.5, 2.0, 0.25]:
        x = self.attend(x * scale)
)python",
                                                3},
                                           Case{"with_a_condition_on_the_run", R"python(
    first = x
    for i in range(self.runs):
        if i > 0:
            x = self.attend(x)
        if i == self.runs - 1:
            x = x + first
)python",
                                                2},
                                           Case{"nested", R"python(
    for i in range(2):
        for j in range(2):
            x = self.attend(x)
        x = torch.tanh(x)
)python",
                                                4},
                                           Case{"never", R"python(
    y = torch.linear(x, self.w)
    for i in range(0):
        y = self.attend(y)
    x = x + y
)python",
                                                0}),
                         [](const auto& info) { return info.param.name; });

class LeaveLoopAlone : public UnrollLoops {};

TEST_P(LeaveLoopAlone, TheLoopStays) {
  auto module = module_of(GetParam());
  const auto graph = unrolled(module);
  EXPECT_EQ(count_kind(*graph, "prim::Loop"), 1u);
  EXPECT_EQ(count_kind(*graph, "aten::softmax"), GetParam().softmaxes);
  expect_same_results(module, graph);
}

INSTANTIATE_TEST_SUITE_P(Others, LeaveLoopAlone,
                         ::testing::Values(Case{"no_attention", R"python(
    for i in range(self.runs):
        x = torch.tanh(torch.linear(x, self.w))
)python",
                                                0},
                                           Case{"as_often_as_the_input_says", R"python(
    for i in range(x.size(0)):
        x = self.attend(x)
)python",
                                                1},
                                           Case{"until_converged", R"python(
    while bool(x.abs().max() > 1.0):
        x = self.attend(x) * 0.1
)python",
                                                1},
                                           Case{"too_often", R"python(
    for i in range(1000):
        x = torch.tanh(self.attend(x) * 0.1)
)python",
                                                1}),
                         [](const auto& info) { return info.param.name; });

// The branch around the loop stays; inside the loop there is another branch.
TEST(UnrollLoops, ALoopInsideABranchIsUnrolled) {
  auto module = module_of({"", R"python(
    if bool(x.sum() > 0):
        for i in range(self.runs):
            if bool(x.mean() > 0):
                x = self.attend(x)
)python",
                           3});
  const auto graph = unrolled(module);
  EXPECT_EQ(count_kind(*graph, "prim::Loop"), 0u);
  EXPECT_EQ(count_kind(*graph, "aten::softmax"), 3u);
  at::manual_seed(0);
  for (const double shift : {-9.0, 0.0, 9.0}) {
    const at::Tensor x = at::randn({2, 5, 6}) + shift;
    EXPECT_LT(largest_difference(module.forward({x}).toTensor(), run_graph(module, graph, {x}).toTensor()), 1e-5);
  }
}

}  // namespace
}  // namespace torchgraft
