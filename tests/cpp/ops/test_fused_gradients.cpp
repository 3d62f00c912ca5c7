#include "op_test.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_mode.h>

#include <algorithm>
#include <functional>
#include <limits>

// Gradients in float32 with the fused CPU kernels against ATen's composition in float64 (which the Python tests hold to
// numerical derivatives), on sizes that fit no block.
namespace torchgraft::ops::test {
namespace {

using Result = std::tuple<at::Tensor, at::Tensor>;
using Tensors = std::vector<at::Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Call {
  std::string name;
  Tensors inputs;  // float64; undefined: absent
  std::function<Result(const Tensors&)> run;
};

// How much output and gate count in the loss.
struct Weights {
  double output = 1.0;
  double gate = 1.0;
};

class FusedGradients : public ::testing::Test {
 protected:
  FusedGradients() { at::manual_seed(0); }
  ~FusedGradients() override {
    set_kernel_mode(KernelMode::kAuto);
    at::set_num_threads(threads_);
  }

  // Of a fixed random functional of both results, in the inputs that `wanted` names (empty: in all); undefined where
  // there is none.
  static Tensors gradients(const Call& call, at::ScalarType type, KernelMode mode, const std::vector<size_t>& wanted = {},
                           Weights weights = {}) {
    set_kernel_mode(mode);
    Tensors inputs;
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      const at::Tensor& input = call.inputs[i];
      const bool is_wanted = wanted.empty() || std::find(wanted.begin(), wanted.end(), i) != wanted.end();
      inputs.push_back(input.defined() ? input.to(type).detach().requires_grad_(is_wanted) : input);
    }
    const auto [output, gate] = call.run(inputs);
    const auto weighted = [type](const at::Tensor& tensor, double weight, uint64_t seed) {
      at::manual_seed(seed);
      return (tensor * randn(tensor.sizes()).to(type)).sum() * weight;
    };
    at::Tensor loss = at::zeros({}, type);
    if (weights.output != 0.0 && output.requires_grad()) {
      loss = loss + weighted(output, weights.output, 1);
    }
    if (weights.gate != 0.0 && gate.requires_grad()) {
      loss = loss + weighted(gate, weights.gate, 2);
    }
    if (loss.requires_grad()) {
      loss.backward();
    }
    Tensors result;
    for (const at::Tensor& input : inputs) {
      result.push_back(input.defined() ? input.grad() : input);
    }
    return result;
  }

  static void expect_same(const Tensors& found, const Tensors& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      SCOPED_TRACE(c10::str("input ", i));
      if (!found[i].defined() || !expected[i].defined()) {
        const at::Tensor& present = found[i].defined() ? found[i] : expected[i];
        EXPECT_FALSE(present.defined() && present.any().item<bool>()) << "a gradient on one side only";
        continue;
      }
      const double size = expected[i].numel() == 0 ? 1.0 : std::max(1.0, expected[i].abs().max().item<double>());
      expect_close(found[i], expected[i], 1e-4, 1e-5 * size);
    }
  }

  static void check(const Call& call) {
    SCOPED_TRACE(call.name);
    const Tensors expected = gradients(call, at::kDouble, KernelMode::kReference);
    expect_same(gradients(call, at::kFloat, KernelMode::kFused), expected);
    expect_same(gradients(call, at::kFloat, KernelMode::kReference), expected);
    for (const Weights weights : {Weights{1.0, 0.0}, Weights{0.0, 1.0}}) {
      SCOPED_TRACE(c10::str("weights ", weights.output, ", ", weights.gate));
      expect_same(gradients(call, at::kFloat, KernelMode::kFused, {}, weights),
                  gradients(call, at::kDouble, KernelMode::kReference, {}, weights));
    }
    check_one_at_a_time(call, expected);
  }

  // What is asked for is computed, and nothing else.
  static void check_one_at_a_time(const Call& call, const Tensors& expected) {
    for (size_t i = 0; i < call.inputs.size(); ++i) {
      if (!call.inputs[i].defined()) {
        continue;
      }
      SCOPED_TRACE(c10::str("only input ", i));
      Tensors alone(expected.size());
      alone[i] = expected[i];
      const Tensors found = gradients(call, at::kFloat, KernelMode::kFused, {i});
      expect_same(found, alone);
      for (size_t j = 0; j < found.size(); ++j) {
        EXPECT_TRUE(j == i || !found[j].defined()) << "input " << j << " got a gradient";
      }
    }
  }

  static void expect_same_bits_by_threads(const Call& call) {
    SCOPED_TRACE(call.name);
    at::set_num_threads(1);
    const Tensors one = gradients(call, at::kFloat, KernelMode::kFused);
    at::set_num_threads(2);
    const Tensors two = gradients(call, at::kFloat, KernelMode::kFused);
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT_TRUE(!one[i].defined() || at::equal(one[i], two[i])) << "input " << i << " depends on the threads";
    }
  }

 private:
  int threads_ = at::get_num_threads();
};

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

// 0: all rows use adapter 1; 1: one each, some -1; 2: the last one for all.
std::optional<at::Tensor> ids_of(int64_t kind, int64_t batch) {
  if (kind == 0) {
    return std::nullopt;
  }
  return kind == 1 ? at::randint(-1, 3, {batch}, at::kLong) : at::full({batch}, 2, at::kLong);
}

std::optional<at::Tensor> token_mask_of(bool wanted, int64_t batch, int64_t tokens) {
  return wanted ? std::make_optional(at::rand({batch, tokens}) < 0.6) : std::nullopt;
}

// A token is not next to its neighbour in memory.
at::Tensor spread(const at::Tensor& tensor) { return at::stack({tensor, tensor}, 2).select(2, 0); }

at::Tensor if_gated(bool gated, at::IntArrayRef sizes) { return gated ? randn(sizes) : at::Tensor(); }

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
            {randn({batch, tokens, hidden}), randn({batch, tokens, hidden}), randn({2, size, hidden}),
             randn({2, size}), randn({2, hidden, size}), randn({2, hidden}), randn({2, 1}), randn({2, 1, hidden}),
             randn({2, 1})},
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

// 0: none. Else [B, 1, S, S_k]: 1 random; 2 hides keys with -inf, all of them from one query; 3 the same with the
// lowest number, where the log-sum-exp is not precise; 4: [B, 1, 1, S_k], hides keys of padding.
at::Tensor attention_mask(int64_t kind, int64_t batch, int64_t queries, int64_t keys) {
  if (kind == 0) {
    return {};
  }
  const at::Tensor random = randn({batch, 1, kind == 4 ? 1 : queries, keys});
  if (kind == 1) {
    return random;
  }
  at::Tensor hidden = at::rand(random.sizes()) < 0.5;
  if (random.numel() > 0) {
    hidden[0][0][0].fill_(true);
  }
  return random.masked_fill(hidden, kind == 3 ? std::numeric_limits<float>::lowest() : -kInfinity);
}

struct AttentionSizes {
  int64_t batch, heads, kv_heads, queries, keys, size, positions;
  int64_t mask = 0;
  bool causal = false;
};

Call attention_call(const AttentionSizes& s, int64_t variant) {
  const auto head_major = [&](int64_t count, int64_t length) {
    return randn({s.batch, length, count, s.size}).transpose(1, 2);
  };
  const int64_t gates = variant % 3;
  Call call{c10::str("prefix ", variant),
            {head_major(s.heads, s.queries), head_major(s.kv_heads, s.keys), head_major(s.kv_heads, s.keys),
             randn({s.batch, s.queries, 12}), randn({3, s.kv_heads, s.positions, s.size}),
             randn({3, s.kv_heads, s.positions, s.size}), if_gated(gates > 0, {3, gates, 12}),
             if_gated(gates > 0, {3, gates})},
            {}};
  call.run = [s, mask = attention_mask(s.mask, s.batch, s.queries, s.keys), ids = ids_of(variant % 3, s.batch),
              length = at::tensor(std::vector<int64_t>{s.positions, (s.positions + 1) / 2, s.positions}, at::kLong)](
                 const Tensors& t) {
    return gated_prefix_attention(t[0], t[1], t[2], t[3], t[4], t[5], length,
                                  mask.defined() ? std::make_optional(mask.to(t[0].scalar_type())) : std::nullopt, 0.0,
                                  s.causal, std::nullopt, s.heads != s.kv_heads, optional(t[6]), optional(t[7]), ids,
                                  1);
  };
  return call;
}

const std::vector<AttentionSizes> kAttention = {{3, 2, 2, 5, 5, 4, 3},
                                                {1, 1, 1, 1, 1, 1, 1},
                                                {2, 4, 2, 33, 33, 32, 10, 2},
                                                {2, 3, 3, 17, 300, 64, 30, 4},
                                                {1, 2, 1, 140, 140, 24, 5, 0, true},
                                                {4, 2, 2, 13, 7, 19, 0, 1},
                                                {2, 2, 2, 9, 9, 256, 17, 3},
                                                {3, 2, 2, 5, 0, 8, 2},
                                                {1, 2, 2, 20, 20, 16, 130, 2},
                                                {2, 6, 2, 70, 100, 32, 10, 1},
                                                {2, 2, 2, 65, 97, 16, 97, 4},
                                                {0, 2, 2, 5, 5, 4, 3}};

TEST_F(FusedGradients, PrefixAttention) {
  for (size_t variant = 0; variant < kAttention.size(); ++variant) {
    check(attention_call(kAttention[variant], static_cast<int64_t>(variant)));
  }
}

TEST_F(FusedGradients, AttentionGivesTheSameBitsForAnyThreads) {
  for (size_t variant = 0; variant < kAttention.size(); ++variant) {
    expect_same_bits_by_threads(attention_call(kAttention[variant], static_cast<int64_t>(variant)));
  }
}

// Query, key and value may lie in memory in any way, and so may what comes in.
TEST_F(FusedGradients, AttentionOnStridedTensors) {
  const AttentionSizes sizes{2, 3, 3, 11, 11, 8, 4};
  Call call = attention_call(sizes, 1);
  const Tensors expected = gradients(call, at::kDouble, KernelMode::kReference);
  const Call plain = call;
  call.run = [plain](const Tensors& t) {
    Tensors changed = t;
    changed[0] = t[0].contiguous();
    changed[1] = t[1].transpose(-1, -2).contiguous().transpose(-1, -2);
    changed[2] = at::stack({t[2], t[2]}, -1).select(-1, 1);
    const auto [output, gate] = plain.run(changed);
    return Result{output.transpose(-1, -2).contiguous().transpose(-1, -2), gate};
  };
  expect_same(gradients(call, at::kFloat, KernelMode::kFused), expected);
}

// A sum's gradient is one number seen as a whole tensor.
TEST_F(FusedGradients, ExpandedGradient) {
  const auto summed = [](const Call& call, at::ScalarType type, KernelMode mode) {
    set_kernel_mode(mode);
    Tensors inputs;
    for (const at::Tensor& input : call.inputs) {
      inputs.push_back(input.to(type).detach().requires_grad_());
    }
    std::get<0>(call.run(inputs)).sum().backward();
    Tensors result;
    for (const at::Tensor& input : inputs) {
      result.push_back(input.grad());
    }
    return result;
  };
  Call linear{"lora_linear",
              {randn({2, 17, 40}), randn({35, 40}), randn({1, 3, 40}), randn({1, 35, 3}), randn({1})},
              {}};
  linear.run = [](const Tensors& t) { return gated_lora_linear(t[0], t[1], std::nullopt, t[2], t[3], t[4]); };
  for (const Call& call : {attention_call({2, 3, 3, 11, 11, 8, 4}, 1), linear}) {
    SCOPED_TRACE(call.name);
    expect_same(summed(call, at::kFloat, KernelMode::kFused), summed(call, at::kDouble, KernelMode::kReference));
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
