#include "support.h"

#include <torchgraft/patch/canonicalise/decompose_einsum.h>
#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_attention.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/jit/testing/file_check.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

// An einsum of inputs `a` and `c`, or of `a` and the parameter `w`.
struct Case {
  const char* name;
  const char* equation;
  std::vector<int64_t> a;
  std::vector<int64_t> other;
  const char* operands;  // "a, c", "a, self.w", "self.w, a"
};

torch::jit::Module module_of(const Case& test) {
  at::manual_seed(0);
  const at::Tensor weight = at::randn(test.other).requires_grad_();
  return make_module({{"w", weight}}, std::string("def forward(self, a: Tensor, c: Tensor) -> Tensor:\n") +
                                          "    return torch.einsum('" + test.equation + "', [" + test.operands +
                                          "])\n");
}

std::shared_ptr<torch::jit::Graph> decomposed(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  decompose_einsum(graph, module);
  simplify(graph);
  graph->lint();
  return graph;
}

// The result and the gradients of both inputs and of the parameter.
std::vector<at::Tensor> run_with_gradients(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph,
                                           const Case& test) {
  at::manual_seed(1);
  const at::Tensor a = at::randn(test.a).requires_grad_();
  const at::Tensor c = at::randn(test.other).requires_grad_();
  const at::Tensor out = run_graph(module, graph, {a, c}).toTensor();
  (out * at::arange(out.numel()).view_as(out).sin()).sum().backward();
  at::Tensor weight = module.attr("w").toTensor();
  std::vector<at::Tensor> results = {out, a.grad()};
  for (const at::Tensor& tensor : {c, weight}) {
    results.push_back(tensor.grad().defined() ? tensor.grad() : at::zeros({1}));
  }
  weight.mutable_grad() = at::Tensor();
  return results;
}

class DecomposeEinsum : public ::testing::TestWithParam<Case> {
 protected:
  void expect_one(const char* kind, const char* other) {
    auto module = module_of(GetParam());
    const auto graph = decomposed(module);
    EXPECT_EQ(count_kind(*graph, kind), 1u);
    EXPECT_EQ(count_kind(*graph, other), 0u);
    EXPECT_EQ(count_kind(*graph, "aten::einsum"), 0u);
    const auto expected = run_with_gradients(module, module.get_method("forward").graph(), GetParam());
    const auto actual = run_with_gradients(module, graph, GetParam());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_LT(largest_difference(expected[i], actual[i]), 1e-5) << "of result " << i;
      EXPECT_EQ(expected[i].sizes(), actual[i].sizes());
    }
  }
};

class Products : public DecomposeEinsum {};

TEST_P(Products, BecomeMatmul) { expect_one("aten::matmul", "aten::linear"); }

INSTANTIATE_TEST_SUITE_P(
    DecomposeEinsum, Products,
    ::testing::Values(
        Case{"scores", "bhqd,bhkd->bhqk", {2, 3, 5, 4}, {2, 3, 6, 4}, "a, c"},
        Case{"scores_of_tokens_first", "bqhd,bkhd->bhqk", {2, 5, 3, 4}, {2, 6, 3, 4}, "a, c"},
        Case{"scores_with_spaces", "b i h d, b j h d -> b h i j", {2, 5, 3, 4}, {2, 6, 3, 4}, "a, c"},
        Case{"scores_of_transposed_keys", "bhqd,bhdk->bhqk", {2, 3, 5, 4}, {2, 3, 4, 6}, "a, c"},
        Case{"scores_with_keys_first", "bkhd,bqhd->bhqk", {2, 6, 3, 4}, {2, 5, 3, 4}, "a, c"},
        Case{"scores_without_heads", "bnd,bmd->bnm", {2, 5, 4}, {2, 6, 4}, "a, c"},
        Case{"without_arrow", "id,jd", {5, 4}, {6, 4}, "a, c"},
        Case{"mixing", "bhqk,bkhd->bqhd", {2, 3, 5, 6}, {2, 6, 3, 4}, "a, c"},
        Case{"mixing_heads_first", "bhqk,bhkd->bhqd", {2, 3, 5, 6}, {2, 3, 6, 4}, "a, c"},
        Case{"mixing_values_first", "bkhd,bhqk->bqhd", {2, 6, 3, 4}, {2, 3, 5, 6}, "a, c"},
        Case{"mixing_into_columns", "bhqk,bkhd->bhdq", {2, 3, 5, 6}, {2, 6, 3, 4}, "torch.softmax(a, -1), c"}),
    [](const auto& info) { return info.param.name; });

class Projections : public DecomposeEinsum {};

TEST_P(Projections, BecomeLinear) { expect_one("aten::linear", "aten::matmul"); }

INSTANTIATE_TEST_SUITE_P(
    DecomposeEinsum, Projections,
    ::testing::Values(Case{"into_heads", "bsd,dhk->bshk", {2, 5, 6}, {6, 3, 4}, "a, self.w"},
                      Case{"into_heads_first", "bsd,hdk->bhsk", {2, 5, 6}, {3, 6, 4}, "a, self.w"},
                      Case{"out_of_heads", "bshk,hkd->bsd", {2, 5, 3, 4}, {3, 4, 6}, "a, self.w"},
                      Case{"out_of_heads_first", "bhsk,hkd->bsd", {2, 3, 5, 4}, {3, 4, 6}, "a, self.w"},
                      Case{"in_out", "bsd,de->bse", {2, 5, 6}, {6, 4}, "a, self.w"},
                      Case{"out_in", "bsd,ed->bse", {2, 5, 6}, {4, 6}, "a, self.w"},
                      Case{"weight_first", "ed,bsd->bse", {2, 5, 6}, {4, 6}, "self.w, a"},
                      Case{"weight_viewed", "bsd,dhk->bshk", {2, 5, 6}, {6, 12}, "a, self.w.view(6, 3, 4)"}),
    [](const auto& info) { return info.param.name; });

class Others : public DecomposeEinsum {};

TEST_P(Others, StayAsTheyAre) {
  const auto graph = decomposed(module_of(GetParam()));
  EXPECT_EQ(count_kind(*graph, "aten::einsum"), 1u);
}

INSTANTIATE_TEST_SUITE_P(DecomposeEinsum, Others,
                         ::testing::Values(Case{"ellipsis", "...qd,...kd->...qk", {2, 5, 4}, {2, 6, 4}, "a, c"},
                                           Case{"diagonal", "bii,bij->bij", {2, 5, 5}, {2, 5, 6}, "a, c"},
                                           Case{"outer", "bi,bj->bij", {2, 5}, {2, 6}, "a, c"},
                                           Case{"sums_one_operand", "bqd,bkde->bqk", {2, 5, 4}, {2, 6, 4, 3}, "a, c"},
                                           Case{"two_rows", "bgqd,bkd->bgqk", {2, 3, 5, 4}, {2, 6, 4}, "a, c"},
                                           Case{"three_operands", "ab,bc,cd->ad", {2, 5}, {5, 5}, "a, c, c"}),
                         [](const auto& info) { return info.param.name; });

constexpr const char* kAttention = R"python(
def forward(self, x: Tensor) -> Tensor:
    q = torch.einsum('bsd,dhk->bshk', [x, self.wq])
    k = torch.einsum('bsd,dhk->bshk', [x, self.wk])
    v = torch.einsum('bsd,dhk->bshk', [x, self.wv])
    p = torch.softmax(torch.einsum(SCORES) * 0.5, -1)
    return torch.einsum('bshk,hkd->bsd', [torch.einsum(MIXED), self.wo])
)python";

// The two products of an attention.
struct AttentionProducts {
  const char* name;
  std::string scores;
  std::string mixed;
};

std::string source_of(const AttentionProducts& products) {
  std::string source = kAttention;
  source.replace(source.find("SCORES"), 6, products.scores);
  source.replace(source.find("MIXED"), 5, products.mixed);
  return source;
}

class Attentions : public ::testing::TestWithParam<AttentionProducts> {};

// The recognisers need linear maps, and an attention that becomes one fused call.
TEST_P(Attentions, BecomeOneFusedCall) {
  at::manual_seed(0);
  const auto weight = [](at::IntArrayRef sizes) { return at::randn(sizes).div_(3.0); };
  auto module = make_module(
      {{"wq", weight({6, 3, 4})}, {"wk", weight({6, 3, 4})}, {"wv", weight({6, 3, 4})}, {"wo", weight({3, 4, 6})}},
      source_of(GetParam()));
  const auto graph = decomposed(module);
  EXPECT_TRUE(raise_attention(graph, module).empty());
  simplify(graph);
  torch::jit::testing::FileCheck()
      .check_count("aten::linear", 3, /*exactly=*/false)
      ->check("aten::scaled_dot_product_attention")
      ->check("aten::linear")
      ->check_not("einsum")
      ->run(*graph);
  const at::Tensor x = at::randn({2, 5, 6});
  EXPECT_LT(largest_difference(module.forward({x}).toTensor(), run_graph(module, graph, {x}).toTensor()), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(DecomposeEinsum, Attentions,
                         ::testing::Values(AttentionProducts{"as_written_most", "'bqhd,bkhd->bhqk', [q, k]",
                                                             "'bhqk,bkhd->bqhd', [p, v]"},
                                           AttentionProducts{"keys_and_values_first", "'bkhd,bqhd->bhqk', [k, q]",
                                                             "'bkhd,bhqk->bqhd', [v, p]"}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
