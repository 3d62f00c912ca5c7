#include "op_test.h"

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/autograd.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_mode.h>

#include <functional>
#include <string>
#include <vector>

// What an operator reads may be the result of a layer norm: that is not kept for the gradient, and the gradient is the
// same.
namespace torchgraft::ops::test {
namespace {

using Op = std::function<at::Tensor(const at::Tensor&)>;

constexpr int64_t kFeatures = 6;

at::Tensor parameter(at::IntArrayRef sizes) { return randn(sizes).requires_grad_(); }

Op lora() {
  return [a = parameter({1, 2, kFeatures}), b = parameter({1, 4, 2}),
          gate = parameter({1, 1, kFeatures})](const at::Tensor& x) {
    return std::get<0>(gated_lora(x, at::zeros({2, 5, 4}, at::kDouble), a, b, at::ones({1}, at::kDouble), gate,
                                  at::zeros({1, 1}, at::kDouble)));
  };
}

Op bottleneck() {
  return [down = parameter({1, 3, kFeatures}), up = parameter({1, kFeatures, 3})](const at::Tensor& x) {
    return std::get<0>(gated_bottleneck(x, at::zeros_like(x), down, at::zeros({1, 3}, at::kDouble), up,
                                        at::zeros({1, kFeatures}, at::kDouble), at::ones({1, 1}, at::kDouble), "tanh"));
  };
}

Op prefix_attention() {
  return [q = randn({2, 2, 5, 3}), key = parameter({1, 2, 2, 3}),
          gate = parameter({1, 1, kFeatures})](const at::Tensor& x) {
    return std::get<0>(gated_prefix_attention(q, q, q, x, key, key, at::full({1}, 2, at::kLong), std::nullopt, 0.0,
                                              false, std::nullopt, false, gate, at::zeros({1, 1}, at::kDouble)));
  };
}

// Reads the norm's result twice.
Op lora_linears() {
  return [w = randn({4, kFeatures}), a = parameter({1, 2, kFeatures}), b = parameter({1, 4, 2})](const at::Tensor& x) {
    const auto once = [&] {
      return std::get<0>(gated_lora_linear(x, w, std::nullopt, a, b, at::ones({1}, at::kDouble)));
    };
    return once() * once();
  };
}

std::vector<Op> ops() { return {lora(), lora_linears(), bottleneck(), prefix_attention()}; }

struct Norm {
  at::Tensor weight, bias;
  at::Tensor operator()(const at::Tensor& x) const {
    const auto given = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
    };
    return at::layer_norm(x, {kFeatures}, given(weight), given(bias));
  }
};

std::vector<Norm> norms() {
  const auto fixed = [] { return randn({kFeatures}); };
  return {{}, {fixed(), {}}, {{}, fixed()}, {fixed(), fixed()}, {parameter({kFeatures}), parameter({kFeatures})}};
}

// Whether `op` keeps its input alive.
bool keeps(const Op& op, at::Tensor normed) {
  const auto memory = normed.storage().getWeakStorageImpl();
  const at::Tensor output = op(normed);
  EXPECT_TRUE(output.requires_grad());
  normed.reset();
  return !memory.expired();
}

at::Tensor gradient(const Op& op, const at::Tensor& input, const Norm& norm, bool had_again) {
  const at::Tensor normed = at::alias(norm(input));
  // Behind a multiplication by 1 it is no norm's result any more.
  const at::Tensor output = op(had_again ? normed : normed * 1.0);
  at::manual_seed(3);
  return torch::autograd::grad({(output * randn(output.sizes())).sum()}, {input})[0];
}

TEST(NormOutput, GradientsAreTheSame) {
  at::manual_seed(0);
  const at::Tensor input = parameter({2, 5, kFeatures});
  for (const Op& op : ops()) {
    for (const Norm& norm : norms()) {
      const at::Tensor expected = gradient(op, input, norm, false);
      EXPECT_GT(expected.abs().max().item<double>(), 1e-3);
      EXPECT_LE((gradient(op, input, norm, true) - expected).abs().max().item<double>(), 1e-12);
    }
  }
}

// The gradients of weights read the norm's result, so they make autograd compute it again. 37 features: whole vectors
// and a remainder. The name selects this test for every copy of the kernels.
TEST(FusedNormOutput, WeightsGradientsAreTheSame) {
  at::manual_seed(0);
  set_kernel_mode(KernelMode::kFused);
  constexpr int64_t kMany = 37;
  for (const at::ScalarType type : {at::kDouble, at::kFloat}) {
    const auto fixed = [type](at::IntArrayRef sizes) { return randn(sizes).to(type); };
    const at::Tensor input = (3 * fixed({2, 19, kMany}) + 1).requires_grad_();
    const at::Tensor a = fixed({1, 2, kMany}).requires_grad_();
    const at::Tensor b = fixed({1, 4, 2});
    const at::Tensor weight = fixed({kMany});
    const at::Tensor bias = fixed({kMany});
    using Given = std::optional<at::Tensor>;
    for (const auto& [its_weight, its_bias] :
         std::vector<std::pair<Given, Given>>{{}, {weight, {}}, {{}, bias}, {weight, bias}}) {
      const at::Tensor normed = at::layer_norm(input, {kMany}, its_weight, its_bias);
      const auto gradient_of_a = [&](const at::Tensor& x) {
        const at::Tensor base = at::zeros({2, 19, 4}, type);
        const auto [output, gate] = gated_lora(x, base, a, b, at::ones({1}, type));
        return torch::autograd::grad({output.square().sum()}, {a}, {}, /*retain_graph=*/true)[0];
      };
      const at::Tensor expected = gradient_of_a(normed * 1.0);
      const double tolerance = (type == at::kFloat ? 1e-5 : 1e-12) * expected.abs().max().item<double>();
      EXPECT_LE((gradient_of_a(normed) - expected).abs().max().item<double>(), tolerance);
    }
  }
  set_kernel_mode(KernelMode::kAuto);
}

TEST(NormOutput, IsNotKept) {
  at::manual_seed(0);
  const at::Tensor input = parameter({2, 5, kFeatures});
  const Norm norm{randn({kFeatures}), randn({kFeatures})};
  for (const Op& op : ops()) {
    EXPECT_FALSE(keeps(op, norm(input)));
    EXPECT_TRUE(keeps(op, norm(input) * 1.0));
  }
}

TEST(NormOutput, IsKeptWhereItCannotBeHadAgainAsItWas) {
  at::manual_seed(0);
  const at::Tensor input = parameter({2, 5, kFeatures});
  const auto changed = [&] {
    at::Tensor normed = Norm{}(input);
    at::NoGradGuard no_grad;
    normed.select(2, 0).zero_();
    return normed;
  };
  const Op op = bottleneck();
  EXPECT_TRUE(keeps(op, changed()));
  const at::Tensor output = op(changed());
  at::Tensor copy = changed();
  const at::Tensor expected = op(copy * 1.0);
  const at::Tensor found = torch::autograd::grad({output.sum()}, {input})[0];
  EXPECT_TRUE(at::equal(found, torch::autograd::grad({expected.sum()}, {input})[0]));

  // ATen keeps the means of bfloat16 in bfloat16.
  const at::Tensor bfloat16 = input.detach().to(at::kBFloat16).requires_grad_();
  const Op bfloat16_lora = [](const at::Tensor& x) {
    const auto like = [](at::IntArrayRef sizes) { return at::ones(sizes, at::kBFloat16); };
    return std::get<0>(gated_lora(x, like({2, 5, 4}), like({1, 2, kFeatures}), like({1, 4, 2}), like({1})));
  };
  EXPECT_TRUE(keeps(bfloat16_lora, Norm{}(bfloat16)));
}

TEST(NormOutput, ASecondBackwardPassSaysThatTheGraphIsGone) {
  const at::Tensor input = parameter({2, 5, kFeatures});
  const at::Tensor normed = Norm{}(input);
  const at::Tensor loss = bottleneck()(normed).sum();
  (normed * 2.0).sum().backward();  // uses the norm's node up
  try {
    loss.backward();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("backward through the graph a second time"), std::string::npos);
  }
  const at::Tensor again = bottleneck()(Norm{}(input)).sum();
  again.backward({}, /*retain_graph=*/true);
  EXPECT_NO_THROW(again.backward());
}

}  // namespace
}  // namespace torchgraft::ops::test
