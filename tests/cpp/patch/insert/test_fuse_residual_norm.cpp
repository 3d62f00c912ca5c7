#include "support.h"

#include <torchgraft/patch/canonicalise/decompose_residual_norm.h>
#include <torchgraft/patch/insert/fuse_residual_norm.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

constexpr const char* kOperator = "torchgraft::residual_norm";

// The graph of forward(x, y), before and after the pass, and decomposed again.
struct Fused {
  explicit Fused(const std::string& body) {
    at::manual_seed(0);
    const auto module = make_module({{"w", at::randn({6})}, {"b", at::randn({6})}, {"wide", at::randn({5, 6})}},
                                    "\ndef forward(self, x: Tensor, y: Tensor) -> Tensor:\n" + body);
    const auto before = module.get_method("forward").graph();
    graph = before->copy();
    count = fuse_residual_norm(graph, module);
    graph->lint();
    const auto back = graph->copy();
    decompose_residual_norm(back);
    back->lint();
    EXPECT_EQ(count_kind(*graph, kOperator), count);
    EXPECT_EQ(count_kind(*back, kOperator), 0u);
    const at::Tensor x = at::randn({2, 5, 6});
    const at::Tensor y = at::randn({2, 5, 6});
    const auto run = [&](const auto& of) { return run_graph(module, of, {x.clone(), y.clone()}).toTensor(); };
    const at::Tensor wanted = run(before);
    EXPECT_LT(largest_difference(run(graph), wanted), 1e-5) << body;
    EXPECT_LT(largest_difference(run(back), wanted), 1e-5) << body;
  }
  std::shared_ptr<torch::jit::Graph> graph;
  size_t count = 0;
};

TEST(FuseResidualNorm, TakesTheNormOfASum) {
  for (const char* body : {"    return torch.layer_norm(x + y, [6], self.w, self.b)\n",
                           "    return torch.layer_norm(x + y, [6], self.w, None, 0.1)\n",
                           "    return torch.layer_norm(x + y[0], [6], self.w, self.b)\n",  // broadcast
                           "    s = x + y\n    n = torch.layer_norm(s, [6], self.w, self.b)\n    return n * s\n"}) {
    const Fused fused(body);
    EXPECT_EQ(fused.count, 1u) << body;
    EXPECT_EQ(count_kind(*fused.graph, "aten::layer_norm") + count_kind(*fused.graph, "aten::add"), 0u) << body;
  }
}

TEST(FuseResidualNorm, LeavesWhatIsNoNormOfASumOfTensors) {
  for (const char* body : {"    return torch.layer_norm(x + 1.0, [6], self.w, self.b)\n",
                           "    return torch.layer_norm(torch.add(x, y, alpha=2), [6], self.w, self.b)\n",
                           "    return torch.layer_norm(x * y, [6], self.w, self.b)\n",
                           "    return torch.layer_norm(x + y, [6], None, None)\n",
                           "    return torch.layer_norm(x + y, [5, 6], self.wide, None)\n",
                           "    return torch.layer_norm(x + y, [6], self.w * 2, self.b)\n"}) {
    EXPECT_EQ(Fused(body).count, 0u) << body;
  }
}

TEST(FuseResidualNorm, LeavesASumThatIsReadOrWrittenBeforeTheNorm) {
  for (const char* body : {"    s = x + y\n    t = s * 2\n    return t + torch.layer_norm(s, [6], self.w, self.b)\n",
                           "    s = x + y\n    s.mul_(x)\n    return torch.layer_norm(s, [6], self.w, self.b)\n",
                           "    r = x[0]\n    x += y\n    return torch.layer_norm(x, [6], self.w, self.b) * r\n",
                           "    s = x + y\n    x.mul_(2)\n    return torch.layer_norm(s, [6], self.w, self.b) + x\n"}) {
    EXPECT_EQ(Fused(body).count, 0u) << body;
  }
}

TEST(FuseResidualNorm, LeavesANormInABranchBehindTheSum) {
  EXPECT_EQ(Fused("    s = x + y\n    if x.size(0) > 1:\n        s = torch.layer_norm(s, [6], self.w, self.b)\n"
                  "    return s\n")
                .count,
            0u);
}

}  // namespace
}  // namespace torchgraft
