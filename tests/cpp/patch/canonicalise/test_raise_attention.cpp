#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_attention.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

constexpr const char* kFused = "aten::scaled_dot_product_attention";

// q, k, v [2, 3, 5, 4] are 12 -> 12 projections of x [2, 5, 12]. `body` makes `out` from them and from `mask`.
struct Case {
  const char* name;
  const char* body;
};

std::string source_of(const Case& test) {
  return std::string(R"python(
def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
    q = torch.linear(x, self.wq).view(x.size(0), x.size(1), 3, 4).transpose(1, 2)
    k = torch.linear(x, self.wk).view(x.size(0), x.size(1), 3, 4).transpose(1, 2)
    v = torch.linear(x, self.wv).view(x.size(0), x.size(1), 3, 4).transpose(1, 2)
)python") +
         test.body + "    return out\n";
}

class RaiseAttention : public ::testing::TestWithParam<Case> {
 protected:
  RaiseAttention() {
    at::manual_seed(0);
    module_ = make_module({{"wq", at::randn({12, 12})}, {"wk", at::randn({12, 12})}, {"wv", at::randn({12, 12})}},
                          source_of(GetParam()));
    graph_ = module_.get_method("forward").graph()->copy();
    simplify(graph_);
  }

  torch::jit::Module module_{"unset"};
  std::shared_ptr<torch::jit::Graph> graph_;
};

TEST_P(RaiseAttention, BecomesOneFusedCallWithTheSameResult) {
  const at::Tensor x = at::randn({2, 5, 12});
  at::Tensor mask = at::zeros({2, 1, 1, 5});
  mask[1][0][0][4] = -1e9;
  const auto unraised = raise_attention(graph_, module_);
  simplify(graph_);
  graph_->lint();
  EXPECT_TRUE(unraised.empty()) << unraised.front().reason;
  EXPECT_EQ(count_kind(*graph_, kFused), 1u);
  EXPECT_EQ(count_kind(*graph_, "aten::softmax"), 0u);
  for (const c10::IValue& given : {c10::IValue(mask), c10::IValue()}) {
    const at::Tensor expected = module_.forward({x, given}).toTensor();
    const at::Tensor actual = run_graph(module_, graph_, {x, given}).toTensor();
    EXPECT_LT(largest_difference(expected, actual), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(Spellings, RaiseAttention,
                         ::testing::Values(Case{"scaled_after", R"python(
    out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2.0, -1), v)
)python"},
                                           Case{"scaled_before_by_size", R"python(
    out = torch.matmul(torch.softmax(torch.matmul(q * q.size(-1) ** -0.5, k.transpose(2, 3)), -1), v)
)python"},
                                           Case{"optional_additive_mask", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.5
    if mask is not None:
        scores = scores + mask
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"optional_mask_that_is_checked", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.5
    if mask is not None:
        assert mask.dim() == 4
        scores = scores + mask
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"optional_masked_fill_after_bias", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.5 + torch.arange(5, dtype=6)
    if mask is not None:
        scores = torch.masked_fill(scores, mask < 0, -1e9)
    out = torch.matmul(torch.softmax(scores, 3), v)
)python"},
                                           Case{"mask_scaled_with_the_scores", R"python(
    scores = (torch.matmul(q, k.transpose(-1, -2)) + torch.arange(5, dtype=6)) / 3.0
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"where", R"python(
    keep = torch.tril(torch.ones([5, 5])) > 0
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = torch.where(keep, scores, torch.full([], -1e9))
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"merged_heads", R"python(
    b, s = x.size(0), x.size(1)
    scores = torch.bmm(q.reshape(b * 3, s, 4), k.reshape(b * 3, s, 4).transpose(1, 2)) * 0.5
    out = torch.bmm(torch.softmax(scores, -1), v.reshape(b * 3, s, 4)).view(b, 3, s, 4)
)python"},
                                           Case{"baddbmm_with_alpha_and_beta", R"python(
    b, s = x.size(0), x.size(1)
    bias = torch.arange(5, dtype=6).expand(b * 3, s, s)
    keys = k.reshape(b * 3, s, 4).transpose(1, 2)
    scores = torch.baddbmm(bias, q.reshape(b * 3, s, 4), keys, beta=2.0, alpha=0.5) * 0.7
    out = torch.bmm(torch.softmax(scores, -1), v.reshape(b * 3, s, 4)).view(b, 3, s, 4)
)python"},
                                           Case{"baddbmm_without_its_bias", R"python(
    b, s = x.size(0), x.size(1)
    keys = k.reshape(b * 3, s, 4).transpose(1, 2)
    scores = torch.baddbmm(torch.ones([1]), q.reshape(b * 3, s, 4), keys, beta=0.0, alpha=0.5)
    out = torch.bmm(torch.softmax(scores, -1), v.reshape(b * 3, s, 4)).view(b, 3, s, 4)
)python"},
                                           Case{"bias_per_head_that_broadcasts", R"python(
    b, s = x.size(0), x.size(1)
    slopes = torch.arange(b * 3, dtype=6).remainder(3).view(b * 3, 1, 1)
    bias = (slopes * torch.arange(s, dtype=6)).view(b * 3, 1, s)
    scores = torch.baddbmm(bias, q.reshape(b * 3, s, 4), k.reshape(b * 3, s, 4).transpose(1, 2), alpha=0.5)
    scores = scores.view(b, 3, s, s)
    if mask is not None:
        scores = scores + mask
    out = torch.bmm(torch.softmax(scores, -1).view(b * 3, s, s), v.reshape(b * 3, s, 4)).view(b, 3, s, 4)
)python"},
                                           Case{"mask_added_with_alpha", R"python(
    scores = torch.add(torch.matmul(q, k.transpose(-1, -2)), torch.arange(5, dtype=6), alpha=3.0)
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"scores_in_double", R"python(
    scores = torch.matmul(q.to(7), k.to(7).transpose(-1, -2)) / 2.0
    out = torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)
)python"},
                                           Case{"inactive_dropout", R"python(
    probabilities = torch.dropout(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), 0.1, self.training)
    out = torch.matmul(probabilities, v)
)python"},
                                           Case{"active_dropout_of_everything", R"python(
    probabilities = torch.dropout(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), 1.0, True)
    out = torch.matmul(probabilities, v)
)python"}),
                         [](const auto& info) { return info.param.name; });

// What the pass must leave alone.
class LeaveAlone : public RaiseAttention {};

TEST_P(LeaveAlone, SaysWhy) {
  const std::string before = graph_->toString(false);
  const auto unraised = raise_attention(graph_, module_);
  ASSERT_EQ(unraised.size(), 1u);
  EXPECT_FALSE(unraised.front().reason.empty());
  EXPECT_EQ(count_kind(*graph_, kFused), 0u);
}

INSTANTIATE_TEST_SUITE_P(Others, LeaveAlone,
                         ::testing::Values(Case{"probabilities_read_elsewhere", R"python(
    probabilities = torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1)
    out = torch.matmul(probabilities, v) + probabilities.sum()
)python"},
                                           Case{"scores_through_tanh", R"python(
    out = torch.matmul(torch.softmax(torch.tanh(torch.matmul(q, k.transpose(-1, -2))), -1), v)
)python"},
                                           Case{"scores_added_with_alpha", R"python(
    scores = torch.add(torch.arange(5, dtype=6), torch.matmul(q, k.transpose(-1, -2)), alpha=3.0)
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"scores_rounded", R"python(
    scores = torch.div(torch.matmul(q, k.transpose(-1, -2)), 2.0, rounding_mode="floor")
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"softmax_over_queries", R"python(
    out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), 2), v)
)python"},
                                           Case{"scale_inside_a_branch", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2))
    if mask is not None:
        scores = scores * 0.5
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"branch_that_writes", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2))
    if mask is not None:
        self.wq.add_(1.0)
        scores = scores + mask
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"branch_that_draws", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + torch.rand_like(mask)
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"branch_that_prints", R"python(
    scores = torch.matmul(q, k.transpose(-1, -2))
    if mask is not None:
        print("masked")
        scores = scores + mask
    out = torch.matmul(torch.softmax(scores, -1), v)
)python"},
                                           Case{"not_attention", R"python(
    out = torch.softmax(q, -1)
)python"}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
