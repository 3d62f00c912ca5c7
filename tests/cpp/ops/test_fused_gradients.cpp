#include "fused_gradients.h"

#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>

// LoRAs and bottlenecks.
namespace torchgraft::ops::test {
namespace {

std::optional<at::Tensor> token_mask_of(bool wanted, int64_t batch, int64_t tokens) {
  return wanted ? std::make_optional(at::rand({batch, tokens}) < 0.6) : std::nullopt;
}

// A token is not next to its neighbour in memory.
at::Tensor spread(const at::Tensor& tensor) { return at::stack({tensor, tensor}, 2).select(2, 0); }

Call lora_linear_call(int64_t batch, int64_t tokens, int64_t in, int64_t out, int64_t rank) {
  Call call{"lora_linear",
            {randn({batch, tokens, in}), randn({out, in}), randn({out}), randn({2, rank, in}), randn({2, out, rank}),
             randn({2}), randn({2, 1, in}), randn({2, 1})},
            {}};
  call.run = [](const Tensors& t) {
    return gated_lora_linear(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], std::nullopt, 1);
  };
  return call;
}

Call bottleneck_call(int64_t batch, int64_t tokens, int64_t hidden, int64_t size) {
  Call call{"bottleneck",
            {randn({batch, tokens, hidden}), randn({batch, tokens, hidden}), randn({2, size, hidden}), randn({2, size}),
             randn({2, hidden, size}), randn({2, hidden}), randn({2, 1}), randn({2, 1, hidden}), randn({2, 1})},
            {}};
  call.run = [](const Tensors& t) {
    return gated_bottleneck(t[0], t[1], t[2], t[3], t[4], t[5], t[6], "gelu", t[7], t[8], std::nullopt, 1);
  };
  return call;
}

TEST_F(FusedGradients, OfNarrowProductsHaveTheSameBitsForAnyThreads) {
  expect_same_bits_by_threads(lora_linear_call(3, 70, 150, 200, 9));
  expect_same_bits_by_threads(bottleneck_call(3, 70, 150, 50));
}

// Sums in float32: no further from the truth than ATen's composition, but for the rounding of what is returned.
TEST_F(FusedGradients, BFloat16) {
  for (Call call : {lora_linear_call(3, 33, 70, 51, 9), bottleneck_call(2, 45, 70, 19), bottleneck_call(1, 5, 9, 2)}) {
    SCOPED_TRACE(call.name);
    for (at::Tensor& input : call.inputs) {
      input = input.to(at::kBFloat16).to(at::kDouble);
    }
    const Tensors expected = gradients(call, at::kDouble, KernelMode::kReference);
    const Tensors found = gradients(call, at::kBFloat16, KernelMode::kFused);
    const Tensors composed = gradients(call, at::kBFloat16, KernelMode::kReference);
    for (size_t i = 0; i < expected.size(); ++i) {
      SCOPED_TRACE(c10::str("input ", i));
      EXPECT_EQ(found[i].scalar_type(), at::kBFloat16);
      const auto error = [&](const at::Tensor& tensor) { return (tensor.to(at::kDouble) - expected[i]).norm(); };
      const double rounding = 0x1p-8 * expected[i].norm().item<double>();
      EXPECT_LE(error(found[i]).item<double>(), 2 * rounding + error(composed[i]).item<double>());
    }
  }
}

TEST_F(FusedGradients, Lora) {
  int64_t variant = 0;
  for (const auto& [batch, tokens, in, out, rank] : {std::tuple(3, 5, 8, 6, 2),
                                                     {1, 1, 1, 1, 1},
                                                     {4, 33, 70, 51, 9},
                                                     {5, 7, 19, 100, 30},
                                                     {3, 40, 33, 67, 31},
                                                     {2, 35, 65, 50, 140},
                                                     {2, 20, 150, 140, 130},
                                                     {1, 20, 40, 1030, 2},
                                                     {0, 4, 8, 8, 2},
                                                     {2, 0, 8, 8, 2},
                                                     {3, 4, 16, 16, 0}}) {
    const bool gated = variant % 3 != 0;
    const auto ids = ids_of(variant % 3, batch);
    const auto mask = token_mask_of(variant % 2 == 0, batch, tokens);
    const Tensors banks = {randn({3, rank, in}), randn({3, out, rank}), randn({3}), if_gated(gated, {3, 1, in}),
                           if_gated(gated, {3, 1})};
    Call call{c10::str("lora ", variant), {spread(randn({batch, tokens, in})), randn({batch, tokens, out})}, {}};
    call.inputs.insert(call.inputs.end(), banks.begin(), banks.end());
    call.run = [ids, mask](const Tensors& t) {
      return gated_lora(t[0], t[1], t[2], t[3], t[4], optional(t[5]), optional(t[6]), ids, 1, mask);
    };
    check(call);
    for (const bool has_bias : {true, false}) {
      Call linear{c10::str("lora_linear ", variant, has_bias ? " with bias" : ""),
                  {spread(randn({batch, tokens, in})), randn({out, in}), has_bias ? randn({out}) : at::Tensor()},
                  {}};
      linear.inputs.insert(linear.inputs.end(), banks.begin(), banks.end());
      linear.run = [ids, mask](const Tensors& t) {
        return gated_lora_linear(t[0], t[1], optional(t[2]), t[3], t[4], t[5], optional(t[6]), optional(t[7]), ids, 1,
                                 mask);
      };
      check(linear);
    }
    ++variant;
  }
}

TEST_F(FusedGradients, LoraLinearOfTheBaseModel) {
  Call call{"base", {randn({2, 3, 5}), randn({4, 5}), randn({4}), randn({1, 2, 5}), randn({1, 4, 2}), randn({1})}, {}};
  call.run = [](const Tensors& t) {
    return gated_lora_linear(t[0], t[1], t[2], t[3], t[4], t[5], std::nullopt, std::nullopt, std::nullopt, -1);
  };
  check(call);
}

TEST_F(FusedGradients, Bottleneck) {
  const std::vector<std::string> functions = {"relu", "swish", "gelu", "gelu_new", "tanh", "mish"};
  int64_t variant = 0;
  for (const auto& [batch, tokens, hidden, size] : {std::tuple(3, 5, 8, 2),
                                                    {1, 1, 1, 1},
                                                    {4, 33, 70, 9},
                                                    {3, 66, 48, 100},
                                                    {2, 3, 17, 33},
                                                    {2, 70, 65, 130},
                                                    {1, 15, 40, 7},
                                                    {0, 4, 8, 2},
                                                    {2, 0, 8, 2}}) {
    for (const int64_t channels : {int64_t{1}, static_cast<int64_t>(hidden)}) {
      const bool gated = variant % 3 != 1;
      Call call{c10::str("bottleneck ", variant),
                {spread(randn({batch, tokens, hidden})), spread(randn({batch, tokens, hidden})),
                 randn({3, size, hidden}), randn({3, size}), randn({3, hidden, size}), randn({3, hidden}),
                 randn({3, channels}), if_gated(gated, {3, 1, hidden}), if_gated(gated, {3, 1})},
                {}};
      call.run = [ids = ids_of(variant % 3, batch), mask = token_mask_of(variant % 2 == 0, batch, tokens),
                  function = functions[variant % functions.size()]](const Tensors& t) {
        return gated_bottleneck(t[0], t[1], t[2], t[3], t[4], t[5], t[6], function, optional(t[7]), optional(t[8]), ids,
                                1, mask);
      };
      check(call);
      ++variant;
    }
  }
}

// A linear map's weight may lie in memory in any way: as Conv1D's does, or otherwise.
TEST_F(FusedGradients, LoraLinearWithStridedWeights) {
  const Call plain = lora_linear_call(2, 40, 70, 51, 9);
  const Tensors expected = gradients(plain, at::kDouble, KernelMode::kReference);
  const std::vector<std::function<at::Tensor(const at::Tensor&)>> layouts = {
      [](const at::Tensor& w) { return w.t().contiguous().t(); },
      [](const at::Tensor& w) { return at::stack({w, w}, -1).select(-1, 1); }};
  for (const auto& layout : layouts) {
    Call call = plain;
    call.run = [&](const Tensors& t) {
      Tensors changed = t;
      changed[1] = layout(t[1]);
      const auto [output, gate] = plain.run(changed);
      return Result{output.transpose(0, 1).contiguous().transpose(0, 1), gate};
    };
    expect_same(gradients(call, at::kFloat, KernelMode::kFused), expected);
  }
}

TEST_F(FusedGradients, DoubleBackwardIsRefused) {
  const at::Tensor x = at::randn({2, 5, 9}).requires_grad_();
  const auto [output, gate] =
      gated_lora_linear(x, at::randn({7, 9}), std::nullopt, at::randn({1, 3, 9}), at::randn({1, 7, 3}), at::ones({1}));
  expect_error(
      [&, result = output] { torch::autograd::grad({result.square().sum()}, {x}, {}, /*retain_graph=*/true, true); },
      "gated_lora_linear: expected create_graph=False, got a double backward, which this op does not support");
}

}  // namespace
}  // namespace torchgraft::ops::test
