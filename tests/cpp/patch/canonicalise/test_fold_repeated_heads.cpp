#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/fold_repeated_heads.h>

#include <gtest/gtest.h>
#include <torch/csrc/jit/testing/file_check.h>

namespace torchgraft {
namespace {

using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// Attention with 4 heads of width 3 for queries, and 2 for keys and values. `repeat` repeats those of k and v to 4.
void expect_folded(const std::string& repeat, bool folded) {
  at::manual_seed(0);
  const auto module = make_module({{"wq", at::randn({12, 12})}, {"wk", at::randn({6, 12})}, {"wv", at::randn({6, 12})}},
                                  R"python(
def forward(self, x: Tensor) -> Tensor:
    b, s = x.size(0), x.size(1)
    q = torch.linear(x, self.wq).view(b, s, 4, 3).transpose(1, 2)
    k = torch.linear(x, self.wk).view(b, s, 2, 3).transpose(1, 2)
    v = torch.linear(x, self.wv).view(b, s, 2, 3).transpose(1, 2)
)python" + repeat + "    return torch.scaled_dot_product_attention(q, k, v)\n");
  const auto before = module.get_method("forward").graph()->copy();
  simplify(before);
  const auto after = before->copy();
  fold_repeated_heads(after, module);
  simplify(after);
  after->lint();
  EXPECT_EQ(after->toString().find("aten::expand") == std::string::npos &&
                after->toString().find("aten::repeat_interleave") == std::string::npos,
            folded)
      << after->toString();
  const at::Tensor x = at::randn({2, 5, 12});
  EXPECT_LE(largest_difference(run_graph(module, after, {x}).toTensor(), run_graph(module, before, {x}).toTensor()),
            1e-6);
}

TEST(FoldRepeatedHeads, HeadsRepeatedByExpandAndReshapeFold) {
  expect_folded(
      "    k = k[:, :, None, :, :].expand(b, 2, 2, s, 3).reshape(b, 4, s, 3)\n"
      "    v = v.unsqueeze(2).expand(b, 2, 2, s, 3).reshape(b, 4, s, 3)\n",
      true);
}

TEST(FoldRepeatedHeads, HeadsRepeatedByRepeatInterleaveFold) {
  expect_folded("    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)\n", true);
}

// enable_gqa repeats each head in a row (0 0 1 1); tiled heads (0 1 0 1) are others.
TEST(FoldRepeatedHeads, TiledHeadsStay) {
  expect_folded(
      "    k = k.unsqueeze(1).expand(b, 2, 2, s, 3).reshape(b, 4, s, 3)\n"
      "    v = v.unsqueeze(1).expand(b, 2, 2, s, 3).reshape(b, 4, s, 3)\n",
      false);
}

}  // namespace
}  // namespace torchgraft
