#include "op_test.h"

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/autograd.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_prefix_attention.h>

#include <functional>

// What an operator reads may be the result of a layer norm: that is not kept for the gradient, and the gradient is the
// same.
namespace torchgraft::ops::test {
namespace {

using Op = std::function<at::Tensor(const at::Tensor&)>;

constexpr int64_t kFeatures = 6;

at::Tensor parameter(at::IntArrayRef sizes) { return randn(sizes).requires_grad_(); }

Op lora() {
  return [a = parameter({1, 2, kFeatures}), b = parameter({1, 4, 2}), gate = parameter({1, 1, kFeatures})](
             const at::Tensor& x) {
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
  return [q = randn({2, 2, 5, 3}), key = parameter({1, 2, 2, 3}), gate = parameter({1, 1, kFeatures})](
             const at::Tensor& x) {
    return std::get<0>(gated_prefix_attention(q, q, q, x, key, key, at::full({1}, 2, at::kLong), std::nullopt, 0.0, false,
                                              std::nullopt, false, gate, at::zeros({1, 1}, at::kDouble)));
  };
}

struct Norm {
  at::Tensor weight, bias;
  at::Tensor operator()(const at::Tensor& x) const {
    const auto given = [](const at::Tensor& tensor) { return tensor.defined() ? std::make_optional(tensor) : std::nullopt; };
    return at::layer_norm(x, {kFeatures}, given(weight), given(bias));
  }
};

std::vector<Norm> norms() {
  return {{}, {randn({kFeatures}), {}}, {randn({kFeatures}), randn({kFeatures})}, {parameter({kFeatures}), parameter({kFeatures})}};
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
  for (const Op& op : {lora(), bottleneck(), prefix_attention()}) {
    for (const Norm& norm : norms()) {
      const at::Tensor expected = gradient(op, input, norm, false);
      EXPECT_GT(expected.abs().max().item<double>(), 1e-3);
      EXPECT_LE((gradient(op, input, norm, true) - expected).abs().max().item<double>(), 1e-12);
    }
  }
}

TEST(NormOutput, IsNotKept) {
  at::manual_seed(0);
  const at::Tensor input = parameter({2, 5, kFeatures});
  for (const Op& op : {lora(), bottleneck(), prefix_attention()}) {
    for (const bool had_again : {true, false}) {
      at::Tensor normed = Norm{randn({kFeatures}), randn({kFeatures})}(input);
      normed = had_again ? normed : normed * 1.0;
      const auto memory = normed.storage().getWeakStorageImpl();
      const at::Tensor output = op(normed);
      normed.reset();
      EXPECT_EQ(memory.expired(), had_again);
      EXPECT_TRUE(output.requires_grad());
    }
  }
}

TEST(NormOutput, ASecondBackwardPassSaysThatTheGraphIsGone) {
  const at::Tensor input = parameter({2, 5, kFeatures});
  const at::Tensor loss = bottleneck()(Norm{}(input)).sum();
  loss.backward();
  EXPECT_THROW(loss.backward(), c10::Error);
  const at::Tensor again = bottleneck()(Norm{}(input)).sum();
  again.backward({}, /*retain_graph=*/true);
  EXPECT_NO_THROW(again.backward());
}

}  // namespace
}  // namespace torchgraft::ops::test
