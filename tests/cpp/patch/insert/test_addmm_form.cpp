#include "support.h"

#include <torchgraft/patch/insert/addmm_form.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::make_module;
using testing::run_graph;

// The graph of forward(x), in addmm form, and read again. All give the same numbers, for each number of dimensions.
struct Forms {
  explicit Forms(const std::string& body) {
    at::manual_seed(0);
    const auto module = make_module({{"w", at::randn({5, 7})}, {"square", at::randn({5, 5})}, {"b", at::randn({7})}},
                                    "\ndef forward(self, x: Tensor) -> Tensor:\n" + body);
    const auto before = module.get_method("forward").graph();
    written = before->copy();
    write_addmm_form(written, module);
    written->lint();
    again = written->copy();
    read_addmm_form(again, module);
    again->lint();
    for (const at::Tensor& x : {at::randn({2, 3, 5}), at::randn({3, 5}), at::randn({5}), at::randn({2, 0, 5}),
                                at::randn({3, 2, 5}).transpose(0, 1), at::randn({2, 2, 3, 5})}) {
      const auto run = [&](const auto& graph) { return run_graph(module, graph, {x}).toTensor(); };
      EXPECT_TRUE(at::allclose(run(written), run(before), 1e-5, 1e-6)) << body << x.sizes();
      EXPECT_TRUE(at::allclose(run(again), run(before), 1e-5, 1e-6)) << body << x.sizes();
    }
  }
  std::shared_ptr<torch::jit::Graph> written, again;
};

TEST(AddmmForm, IsThatOfAMapWithATransposedWeight) {
  const Forms forms("    return torch.linear(x, torch.t(self.w), self.b)\n");
  EXPECT_EQ(count_kind(*forms.written, "aten::linear") + count_kind(*forms.written, "aten::t"), 0u);
  EXPECT_EQ(count_kind(*forms.written, "aten::addmm"), 1u);
  EXPECT_EQ(count_kind(*forms.again, "aten::linear"), 1u);
  EXPECT_EQ(count_kind(*forms.again, "aten::addmm"), 0u);
}

TEST(AddmmForm, LeavesOtherMapsAlone) {
  for (const char* body : {"    return torch.linear(x, self.square)\n",           // as the model holds it
                           "    return torch.linear(x, torch.t(self.w))\n",       // without a bias
                           "    return torch.linear(x, torch.t(self.w * 2))\n"})  // computed
  {
    const Forms forms(body);
    EXPECT_EQ(count_kind(*forms.written, "aten::linear"), 1u) << body;
  }
}

TEST(AddmmForm, ReadsNoOtherView) {
  for (const char* body : {"    y = torch.addmm(self.b, x.reshape([-1, 5]), self.w)\n    return y.view([-1, 7])\n",
                           "    y = torch.addmm(self.b, x.reshape([-1, 5]), self.w, beta=2)\n"
                           "    return y.view(x.size()[:-1] + [7])\n",
                           "    y = torch.addmm(self.b, x.reshape([-1, 5]), self.w)\n"
                           "    return y.view(x.size()[:-1] + [7, 1])\n"}) {
    EXPECT_EQ(count_kind(*Forms(body).again, "aten::linear"), 0u) << body;
  }
}

}  // namespace
}  // namespace torchgraft
