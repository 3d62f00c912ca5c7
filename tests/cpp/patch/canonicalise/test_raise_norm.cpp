#include "support.h"

#include <torchgraft/patch/canonicalise/fold_attributes.h>
#include <torchgraft/patch/canonicalise/raise_norm.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

constexpr const char* kRms = "aten::rms_norm";
constexpr const char* kLayer = "aten::layer_norm";

// Spellings of norms of x [2, 5, 12]. `w` and `b` are the module's parameters [12], `body` makes `out`.
struct Case {
  const char* name;
  const char* kind;  // of the node that the norm becomes, or must not become
  const char* body;
};

torch::jit::Module module_of(const Case& test, at::ScalarType dtype) {
  at::manual_seed(0);
  const auto parameter = [&] { return at::randn({12}).to(dtype).requires_grad_(); };
  const at::Tensor w = parameter();
  return make_module({{"w", w}, {"b", parameter()}},
                     "def forward(self, x: Tensor) -> Tensor:\n" + std::string(test.body) + "    return out\n");
}

std::shared_ptr<torch::jit::Graph> raised(const torch::jit::Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  raise_norm(graph, module);
  graph->lint();
  return graph;
}

// The result, and the gradients of x, w and b for a loss that weighs all elements differently.
std::vector<at::Tensor> run_with_gradients(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph,
                                           const at::Tensor& input) {
  const at::Tensor x = input.detach().clone().requires_grad_();
  const at::Tensor out = run_graph(module, graph, {x}).toTensor();
  const at::Tensor weights = at::arange(out.numel(), at::kDouble).sin().view_as(out);
  (out.to(at::kDouble) * weights).sum().backward();
  std::vector<at::Tensor> results = {out, x.grad()};
  for (const char* name : {"w", "b"}) {
    at::Tensor parameter = module.attr(name).toTensor();
    results.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros({1}));
    parameter.mutable_grad() = at::Tensor();
  }
  return results;
}

class RaiseNorm : public ::testing::TestWithParam<Case> {
 protected:
  // Largest relative difference of results and gradients; dtypes must agree.
  double difference(at::ScalarType dtype) {
    auto module = module_of(GetParam(), dtype);
    auto before = module.get_method("forward").graph()->copy();
    const at::Tensor x = (at::randn({2, 5, 12}) * 3 + 1).to(dtype);
    const auto expected = run_with_gradients(module, before, x);
    const auto actual = run_with_gradients(module, raised(module), x);
    double largest = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(expected[i].scalar_type(), actual[i].scalar_type()) << "of result " << i;
      const double scale = std::max(1.0, expected[i].abs().max().item<double>());
      largest = std::max(largest, largest_difference(expected[i], actual[i]) / scale);
    }
    return largest;
  }
};

TEST_P(RaiseNorm, BecomesOneNode) {
  const auto graph = raised(module_of(GetParam(), at::kFloat));
  EXPECT_EQ(count_kind(*graph, GetParam().kind), 1u);
  for (const char* kind : {"aten::rsqrt", "aten::sqrt", "aten::pow", "aten::mean", "aten::var", "aten::sub"}) {
    EXPECT_EQ(count_kind(*graph, kind), 0u) << kind;
  }
}

TEST_P(RaiseNorm, KeepsResultsAndGradients) {
  EXPECT_LT(difference(at::kFloat), 1e-6);
  EXPECT_LT(difference(at::kDouble), 1e-6);
}

// Differences are a few roundings of the result's own precision: 8 bits, 11 bits.
TEST_P(RaiseNorm, KeepsResultsIn16Bits) {
  EXPECT_LT(difference(at::kBFloat16), 4.0 / 128);
  EXPECT_LT(difference(at::kHalf), 4.0 / 1024);
}

INSTANTIATE_TEST_SUITE_P(Spellings, RaiseNorm,
                         ::testing::Values(Case{"rms_cast_there_and_back", kRms, R"python(
    h = x.to(6)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2)
    out = self.w * h.to(x.dtype)
)python"},
                                           Case{"rms_statistics_only_in_float32", kRms, R"python(
    variance = x.to(6).pow(2).mean(-1, keepdim=True)
    out = self.w * (x * torch.rsqrt(variance + 1e-2))
)python"},
                                           Case{"rms_conditional_cast", kRms, R"python(
    variance = x.to(6).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 1e-2)
    if self.w.dtype in [5, 15]:
        h = h.to(self.w.dtype)
    out = self.w * h
)python"},
                                           Case{"rms_weight_before_the_cast", kRms, R"python(
    h = x.float()
    out = (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-2) * (1.0 + self.w.float())).type_as(x)
)python"},
                                           Case{"rms_of_the_dtype_of_a_cast", kRms, R"python(
    wide = x.to(7)
    out = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)).type_as(wide) * self.w
)python"},
                                           Case{"rms_root_and_division", kRms, R"python(
    out = x / torch.sqrt(torch.mean(x ** 2, [-1], True) + 1e-2) * self.w
)python"},
                                           Case{"rms_reciprocal", kRms, R"python(
    out = torch.reciprocal(torch.sqrt(torch.square(x).mean(-1, True) + 1e-2)) * x * self.w
)python"},
                                           Case{"rms_power", kRms, R"python(
    out = x * (x.pow(2).mean(-1, True) + 1e-2).pow(-0.5) * self.w
)python"},
                                           Case{"layer_with_casts", kLayer, R"python(
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + 1e-2)
    out = self.w * h.to(x.dtype) + self.b
)python"},
                                           Case{"layer_of_variance", kLayer, R"python(
    mean = x.mean(-1, keepdim=True)
    out = self.b + (x - mean) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"layer_of_corrected_variance", kLayer, R"python(
    variance = torch.var(x, [-1], correction=0, keepdim=True)
    out = (x - x.mean(-1, True)) / (variance + 1e-2).sqrt() * self.w + self.b
)python"},
                                           Case{"layer_without_bias", kLayer, R"python(
    c = x - x.mean(-1, keepdim=True)
    out = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + 1e-2) * self.w
)python"}),
                         [](const auto& info) { return info.param.name; });

// Code that must stay: it is no norm, or another reader needs a part of the norm.
class LeaveNormAlone : public RaiseNorm {};

TEST_P(LeaveNormAlone, TheGraphStays) {
  auto module = module_of(GetParam(), at::kFloat);
  auto graph = module.get_method("forward").graph()->copy();
  simplify(graph);
  const std::string before = graph->toString(false);
  raise_norm(graph, module);
  EXPECT_EQ(graph->toString(false), before);
}

INSTANTIATE_TEST_SUITE_P(Others, LeaveNormAlone,
                         ::testing::Values(Case{"over_tokens", kRms, R"python(
    out = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"eps_not_constant", kRms, R"python(
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.b.sum()) * self.w
)python"},
                                           Case{"eps_outside_the_root", kRms, R"python(
    out = x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-2) * self.w
)python"},
                                           Case{"cubed", kRms, R"python(
    out = x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"of_another_value", kRms, R"python(
    out = torch.relu(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"variance_read_elsewhere", kRms, R"python(
    variance = x.pow(2).mean(-1, keepdim=True)
    out = x * torch.rsqrt(variance + 1e-2) * self.w + variance
)python"},
                                           Case{"mean_read_elsewhere", kLayer, R"python(
    mean = x.mean(-1, keepdim=True)
    out = (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-2) * self.w + mean
)python"},
                                           Case{"unbiased_variance", kLayer, R"python(
    out = (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=True, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"multiplied_by_the_root", kRms, R"python(
    out = x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2) * self.w
)python"},
                                           Case{"width_not_known", kRms, R"python(
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
)python"}),
                         [](const auto& info) { return info.param.name; });

TEST(RaiseNorm, WeightsThatShareTheNormalisedValueBecomeANormEach) {
  auto module = module_of({"", kRms, R"python(
    h = torch.linear(x, torch.ones([12, 12])) * 0.1
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2)
    out = n * self.w + torch.relu(n * self.b) + torch.tanh(n)
)python"},
                          at::kFloat);
  const at::Tensor x = at::randn({2, 5, 12});
  const auto graph = raised(module);
  EXPECT_GE(count_kind(*graph, kRms), 2u);
  EXPECT_LT(largest_difference(module.forward({x}).toTensor(), run_graph(module, graph, {x}).toTensor()), 1e-6);
}

// float16 squares overflow from 256 on: the result must come from float32.
TEST(RaiseNorm, Float16IsComputedInFloat32) {
  auto module = module_of({"", kRms, R"python(
    h = x.float()
    out = self.w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2)).to(x.dtype)
)python"},
                          at::kHalf);
  const at::Tensor x = at::full({1, 3, 12}, 3000.0, at::kHalf);
  const at::Tensor out = run_graph(module, raised(module), {x}).toTensor();
  EXPECT_LT(largest_difference(out, module.forward({x}).toTensor()), 1e-3);
}

// A trace holds `.to(float32)` as a constant. With float32 weights the result is float32 for 16-bit input too.
TEST(RaiseNorm, MixedTypesArePromotedAsBefore) {
  auto module = module_of({"", kRms, R"python(
    h = x.to(6)
    out = self.w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2)).to(6)
)python"},
                          at::kDouble);
  for (const auto dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    const at::Tensor x = at::randn({2, 3, 12}).to(dtype);
    const at::Tensor out = run_graph(module, raised(module), {x}).toTensor();
    EXPECT_EQ(out.scalar_type(), module.forward({x}).toTensor().scalar_type());
  }
}

}  // namespace
}  // namespace torchgraft
