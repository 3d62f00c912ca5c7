#include "op_test.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_bottleneck_linear.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/kernel_mode.h>

#include <cmath>
#include <functional>
#include <limits>

// Every fused CPU kernel against ATen's composition in float64, on sizes that fit no register block: in float32, and in
// bfloat16, where all that may be between them is what float32 may be off and one rounding to the nearest.
namespace torchgraft::ops::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Result = std::tuple<at::Tensor, at::Tensor>;

struct Call {
  std::string name;
  std::vector<at::Tensor> per_row;  // [B, ...]
  std::vector<at::Tensor> banks;    // [N, ...]
  std::optional<at::Tensor> ids;    // [B]
  std::optional<at::Tensor> token_mask;
  std::function<Result(const Call&)> run;
  bool rows_are_exact = true;

  Call with(const std::function<at::Tensor(const at::Tensor&)>& rows,
            const std::function<at::Tensor(const at::Tensor&)>& of_banks) const {
    Call copy = *this;
    for (at::Tensor& tensor : copy.per_row) {
      tensor = tensor.defined() ? rows(tensor) : tensor;
    }
    for (at::Tensor& tensor : copy.banks) {
      tensor = of_banks(tensor);
    }
    return copy;
  }
  Call cast(at::ScalarType type) const {
    const auto cast = [type](const at::Tensor& tensor) {
      return tensor.is_floating_point() ? tensor.to(type) : tensor;
    };
    return with(cast, cast);
  }
  Call row(int64_t index) const {
    Call copy = with([index](const at::Tensor& tensor) { return tensor.narrow(0, index, 1); },
                     [](const at::Tensor& tensor) { return tensor; });
    copy.ids = ids->narrow(0, index, 1);
    copy.token_mask = token_mask ? std::make_optional(token_mask->narrow(0, index, 1)) : std::nullopt;
    return copy;
  }
  Result operator()() const { return run(*this); }
};

class FusedKernels : public ::testing::Test {
 protected:
  FusedKernels() { at::manual_seed(0); }
  ~FusedKernels() override {
    set_kernel_mode(KernelMode::kAuto);
    at::set_num_threads(threads_);
  }

  static Result fused(const Call& call, at::ScalarType type) {
    set_kernel_mode(KernelMode::kFused);
    return call.cast(type)();
  }

  static void check(const Call& call) {
    check(call, at::kFloat);
    check(call, at::kBFloat16);
  }

  static void check(const Call& call, at::ScalarType type) {
    SCOPED_TRACE(c10::str(call.name, ", ", type));
    at::NoGradGuard no_grad;
    set_kernel_mode(KernelMode::kReference);
    const auto [expected, expected_gate] = call.cast(type).cast(at::kDouble)();
    const auto [output, gate] = fused(call, type);
    const double size = expected.numel() == 0 ? 1.0 : std::max(1.0, expected.abs().max().item<double>());
    const double rounding = type == at::kFloat ? 0.0 : std::ldexp(1.0, -8);  // of 8 bits, to the nearest
    ASSERT_EQ(output.sizes(), expected.sizes());
    ASSERT_EQ(output.scalar_type(), type);
    const double off = (output.to(at::kDouble) - expected).abs().sub(rounding * expected.abs()).sum().item<double>();
    EXPECT_LE(off, 1e-5 * size * expected.numel());
    expect_close(output, expected, 1e-5 + rounding, 1e-5 * size);
    expect_close(gate, expected_gate, 1e-5 + rounding, 1e-6);

    at::set_num_threads(2);
    const Result two = fused(call, type);
    at::set_num_threads(1);
    const Result one = fused(call, type);
    at::set_num_threads(2);
    EXPECT_TRUE(at::equal(std::get<0>(one), std::get<0>(two))) << "the bits depend on the number of threads";
    if (!call.ids || output.size(1) == 0 || !call.rows_are_exact) {
      return;
    }
    for (int64_t b = 0; b < call.ids->size(0); ++b) {
      EXPECT_TRUE(at::equal(std::get<0>(fused(call.row(b), type))[0], output[b]))
          << "row " << b << " depends on the others";
    }
  }

 private:
  int threads_ = at::get_num_threads();
};

std::optional<at::Tensor> ids_of(int64_t kind, int64_t batch, int64_t adapters) {
  if (kind == 0) {
    return std::nullopt;
  }
  return kind == 1 ? at::randint(-1, adapters, {batch}, at::kLong) : at::full({batch}, adapters - 1, at::kLong);
}

std::optional<at::Tensor> mask_of(bool wanted, int64_t batch, int64_t tokens) {
  return wanted ? std::make_optional(at::rand({batch, tokens}) < 0.6) : std::nullopt;
}

// A token is not next to its neighbour in memory.
at::Tensor spread(const at::Tensor& tensor) { return at::stack({tensor, tensor}, 2).select(2, 0); }

std::optional<at::Tensor> bank(const Call& call, size_t index) {
  return index < call.banks.size() ? std::make_optional(call.banks[index]) : std::nullopt;
}

TEST_F(FusedKernels, Lora) {
  int64_t variant = 0;
  for (const auto& [batch, tokens, in, out, rank] : {std::tuple(3, 5, 8, 6, 2),
                                                     {1, 1, 1, 1, 1},
                                                     {4, 33, 70, 51, 9},
                                                     {2, 129, 64, 96, 16},
                                                     {2, 50, 40, 33, 3},
                                                     {3, 16, 37, 49, 5},
                                                     {2, 20, 24, 35, 4},
                                                     {1, 18, 24, 38, 4},
                                                     {5, 7, 19, 100, 130},
                                                     {0, 4, 8, 8, 2},
                                                     {2, 0, 8, 8, 2},
                                                     {3, 4, 16, 16, 0}}) {
    const bool gated = variant % 3 != 0;
    Call call{c10::str("lora ", variant),          {}, {}, ids_of(variant % 3, batch, 3),
              mask_of(variant % 2, batch, tokens), {}};
    call.per_row = {spread(randn({batch, tokens, in})), randn({batch, tokens, out})};
    call.banks = {randn({3, rank, in}), randn({3, out, rank}), randn({3})};
    if (gated) {
      call.banks.push_back(randn({3, 1, in}));
      call.banks.push_back(randn({3, 1}));
    }
    call.run = [](const Call& c) {
      return gated_lora(c.per_row[0], c.per_row[1], c.banks[0], c.banks[1], c.banks[2], bank(c, 3), bank(c, 4), c.ids,
                        1, c.token_mask);
    };
    check(call);
    // Numbers that bfloat16 has, too.
    const at::Tensor weight = randn({out, in}).to(at::kBFloat16).to(at::kDouble);
    const std::optional<at::Tensor> bias =
        gated ? std::make_optional(randn({out}).to(at::kBFloat16).to(at::kDouble)) : std::nullopt;
    call.name = c10::str("lora_linear ", variant);
    call.run = [weight, bias](const Call& c) {
      const auto type = c.per_row[0].scalar_type();
      return gated_lora_linear(c.per_row[0], weight.to(type), bias ? std::make_optional(bias->to(type)) : bias,
                               c.banks[0], c.banks[1], c.banks[2], bank(c, 3), bank(c, 4), c.ids, 1, c.token_mask);
    };
    check(call);
    ++variant;
  }
}

TEST_F(FusedKernels, Bottleneck) {
  const std::vector<std::string> functions = {"relu", "swish", "gelu", "gelu_new", "tanh", "sigmoid", "linear", "mish"};
  int64_t variant = 0;
  for (const auto& [batch, tokens, hidden, size] : {std::tuple(3, 5, 8, 2),
                                                    {1, 1, 1, 1},
                                                    {4, 33, 70, 9},
                                                    {2, 129, 64, 48},
                                                    {5, 7, 100, 131},
                                                    {3, 66, 96, 200},
                                                    {1, 27, 70, 131},
                                                    {2, 45, 97, 100},
                                                    {2, 3, 17, 33},
                                                    {0, 4, 8, 2}}) {
    for (const int64_t channels : {int64_t{1}, static_cast<int64_t>(hidden)}) {
      Call call{c10::str("bottleneck ", variant),    {}, {}, ids_of(variant % 3, batch, 3),
                mask_of(variant % 2, batch, tokens), {}};
      call.per_row = {spread(randn({batch, tokens, hidden})), spread(randn({batch, tokens, hidden}))};
      call.banks = {randn({3, size, hidden}), randn({3, size}), randn({3, hidden, size}), randn({3, hidden}),
                    randn({3, channels})};
      if (variant % 3 != 1) {
        call.banks.push_back(randn({3, 1, hidden}));
        call.banks.push_back(randn({3, 1}));
      }
      call.run = [function = functions[variant % functions.size()]](const Call& c) {
        return gated_bottleneck(c.per_row[0], c.per_row[1], c.banks[0], c.banks[1], c.banks[2], c.banks[3], c.banks[4],
                                function, bank(c, 5), bank(c, 6), c.ids, 1, c.token_mask);
      };
      // ATen rounds its own element-wise functions by where in memory a value lies.
      call.rows_are_exact = functions[variant % functions.size()] != "mish";
      check(call);
      if (channels == 1) {
        // Numbers that bfloat16 has, too.
        const int64_t features = 3 * hidden + variant;
        const at::Tensor weight = randn({hidden, features}).to(at::kBFloat16).to(at::kDouble);
        const std::optional<at::Tensor> bias =
            variant % 4 ? std::make_optional(randn({hidden}).to(at::kBFloat16).to(at::kDouble)) : std::nullopt;
        call.name = c10::str("bottleneck_linear ", variant);
        call.per_row[1] = spread(randn({batch, tokens, features}));
        call.run = [weight, bias, function = functions[variant % functions.size()]](const Call& c) {
          const auto type = c.per_row[0].scalar_type();
          return gated_bottleneck_linear(
              c.per_row[0], c.per_row[1], weight.to(type), bias ? std::make_optional(bias->to(type)) : bias, c.banks[0],
              c.banks[1], c.banks[2], c.banks[3], c.banks[4], function, bank(c, 5), bank(c, 6), c.ids, 1, c.token_mask);
        };
        check(call);
      }
      ++variant;
    }
  }
}

// [B, h or 1, S, S_k]: 0 none, 1 random, 2 hides keys with -inf, also all of them, 3 the same with the lowest number.
at::Tensor attention_mask(int64_t kind, int64_t batch, int64_t queries, int64_t keys) {
  if (kind == 0) {
    return {};
  }
  const at::Tensor random = randn({batch, 1, queries, keys});
  if (kind == 1) {
    return random;
  }
  at::Tensor hidden = at::rand({batch, 1, queries, keys}) < 0.5;
  if (batch > 0 && queries > 0) {
    hidden[0][0][0].fill_(true);
  }
  return random.masked_fill(hidden, kind == 2 ? -kInfinity : std::numeric_limits<float>::lowest());
}

TEST_F(FusedKernels, PrefixAttention) {
  int64_t variant = 0;
  for (const auto& [batch, heads, kv_heads, queries, keys, size, positions] : {std::tuple(3, 2, 2, 5, 5, 4, 3),
                                                                               {1, 1, 1, 1, 1, 1, 1},
                                                                               {2, 4, 2, 33, 33, 32, 10},
                                                                               {2, 3, 3, 17, 600, 64, 30},
                                                                               {1, 2, 1, 40, 1040, 80, 5},
                                                                               {4, 2, 2, 13, 7, 19, 0},
                                                                               {2, 2, 2, 9, 9, 256, 17},
                                                                               {3, 2, 2, 5, 0, 8, 2},
                                                                               {1, 2, 2, 20, 20, 16, 530},
                                                                               {2, 2, 2, 30, 30, 32, 10},
                                                                               {0, 2, 2, 5, 5, 4, 3},
                                                                               // The steps of a decoder.
                                                                               {3, 4, 2, 1, 600, 64, 10},
                                                                               {2, 2, 2, 1, 130, 80, 30},
                                                                               {2, 4, 1, 4, 2100, 19, 5},
                                                                               {3, 2, 2, 3, 20, 16, 530},
                                                                               {3, 2, 2, 4, 4, 8, 3},
                                                                               {2, 2, 1, 2, 20, 8, 2060}}) {
    const int64_t kind = variant % 4;
    const bool causal = kind == 0 && queries == keys && variant % 8 != 0;
    const int64_t gates = variant % 3;
    Call call{c10::str("prefix ", variant), {}, {}, ids_of(variant % 3, batch, 3), std::nullopt, {}};
    const auto head_major = [&](int64_t count, int64_t length) {
      return randn({batch, length, count, size}).transpose(1, 2);
    };
    call.per_row = {head_major(heads, queries), head_major(kv_heads, keys), head_major(kv_heads, keys),
                    randn({batch, queries, 12}), attention_mask(kind, batch, queries, keys)};
    call.banks = {randn({3, kv_heads, positions, size}), randn({3, kv_heads, positions, size}),
                  at::tensor(std::vector<int64_t>{positions, positions / 2, 0}, at::kLong)};
    if (gates > 0) {
      call.banks.push_back(randn({3, gates, 12}));
      call.banks.push_back(randn({3, gates}));
    }
    call.run = [causal](const Call& c) {
      const at::Tensor& mask = c.per_row[4];
      return gated_prefix_attention(c.per_row[0], c.per_row[1], c.per_row[2], c.per_row[3], c.banks[0], c.banks[1],
                                    c.banks[2], mask.defined() ? std::make_optional(mask) : std::nullopt, 0.0, causal,
                                    std::nullopt, c.per_row[0].size(1) != c.per_row[1].size(1), bank(c, 3), bank(c, 4),
                                    c.ids, 1);
    };
    check(call);
    ++variant;
  }
}

// The gradients of sum(output^2) + sum(gate) in all floating tensors: forward passes are fused, the rest is not.
std::vector<at::Tensor> gradients(const Call& call, at::ScalarType type) {
  Call cast = call.cast(type);
  std::vector<at::Tensor> inputs;
  for (std::vector<at::Tensor>* tensors : {&cast.per_row, &cast.banks}) {
    for (at::Tensor& tensor : *tensors) {
      if (tensor.defined() && tensor.is_floating_point()) {
        tensor = tensor.detach().clone().requires_grad_();
        inputs.push_back(tensor);
      }
    }
  }
  const auto [output, gate] = cast();
  (output.square().sum() + (gate.requires_grad() ? gate.sum() : at::zeros({}, output.options()))).backward();
  std::vector<at::Tensor> result;
  for (const at::Tensor& input : inputs) {
    result.push_back(input.grad().defined() ? input.grad() : at::zeros_like(input));
  }
  return result;
}

void expect_same_gradients(const Call& call) {
  SCOPED_TRACE(call.name);
  set_kernel_mode(KernelMode::kReference);
  const std::vector<at::Tensor> expected = gradients(call, at::kDouble);
  set_kernel_mode(KernelMode::kFused);
  const std::vector<at::Tensor> found = gradients(call, at::kFloat);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    const double size = expected[i].numel() == 0 ? 1.0 : std::max(1.0, expected[i].abs().max().item<double>());
    expect_close(found[i], expected[i], 1e-4, 1e-5 * size);
  }
}

TEST_F(FusedKernels, Gradients) {
  for (const int64_t kind : {0, 1, 2}) {
    Call lora{c10::str("lora ", kind), {}, {}, ids_of(kind, 3, 3), mask_of(kind == 1, 3, 9), {}};
    lora.per_row = {randn({3, 9, 20}), randn({3, 9, 12})};
    lora.banks = {randn({3, 4, 20}), randn({3, 12, 4}), randn({3}), randn({3, 1, 20}), randn({3, 1})};
    lora.run = [](const Call& c) {
      return gated_lora(c.per_row[0], c.per_row[1], c.banks[0], c.banks[1], c.banks[2], c.banks[3], c.banks[4], c.ids,
                        1, c.token_mask);
    };
    expect_same_gradients(lora);
    for (const char* function : {"relu", "gelu", "mish"}) {
      Call bottleneck{c10::str(function, kind), {}, {}, ids_of(kind, 3, 3), mask_of(kind == 1, 3, 9), {}};
      bottleneck.per_row = {randn({3, 9, 20}), randn({3, 9, 20})};
      bottleneck.banks = {randn({3, 5, 20}), randn({3, 5}),     randn({3, 20, 5}), randn({3, 20}),
                          randn({3, 1}),     randn({3, 1, 20}), randn({3, 1})};
      bottleneck.run = [function](const Call& c) {
        return gated_bottleneck(c.per_row[0], c.per_row[1], c.banks[0], c.banks[1], c.banks[2], c.banks[3], c.banks[4],
                                function, c.banks[5], c.banks[6], c.ids, 1, c.token_mask);
      };
      expect_same_gradients(bottleneck);
    }
    for (const int64_t keys : {9, 0}) {
      Call prefix{c10::str("prefix ", kind, ", keys ", keys), {}, {}, ids_of(kind, 3, 3), std::nullopt, {}};
      prefix.per_row = {randn({3, 9, 2, 16}).transpose(1, 2), randn({3, keys, 2, 16}).transpose(1, 2),
                        randn({3, keys, 2, 16}).transpose(1, 2), randn({3, 9, 12}), attention_mask(kind, 3, 9, keys)};
      prefix.per_row[4] = keys == 0 ? at::Tensor() : prefix.per_row[4];
      prefix.banks = {randn({3, 2, 6, 16}), randn({3, 2, 6, 16}), at::full({3}, 6, at::kLong), randn({3, 1, 12}),
                      randn({3, 1})};
      prefix.run = [](const Call& c) {
        const at::Tensor mask = c.per_row[4].defined() ? c.per_row[4].detach() : at::Tensor();
        return gated_prefix_attention(c.per_row[0], c.per_row[1], c.per_row[2], c.per_row[3], c.banks[0], c.banks[1],
                                      c.banks[2], mask.defined() ? std::make_optional(mask) : std::nullopt, 0.0, false,
                                      std::nullopt, false, c.banks[3], c.banks[4], c.ids, 1);
      };
      expect_same_gradients(prefix);
    }
  }
}

TEST_F(FusedKernels, NotANumberIsNotLost) {
  at::NoGradGuard no_grad;
  set_kernel_mode(KernelMode::kFused);
  at::Tensor query = at::randn({1, 2, 20, 16});
  query[0][1][3][5] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor other = at::randn({1, 2, 20, 16});
  const at::Tensor prefix = at::randn({1, 2, 4, 16});
  const auto [output, gate] =
      gated_prefix_attention(query, other, other, at::randn({1, 20, 8}), prefix, prefix, at::full({1}, 4, at::kLong));
  EXPECT_TRUE(output[0][1][3].isnan().all().item<bool>());
  EXPECT_EQ(output.isnan().sum().item<int64_t>(), 16);
}

TEST_F(FusedKernels, ReferenceModeIsAtensComposition) {
  at::NoGradGuard no_grad;
  const at::Tensor x = at::randn({2, 40, 96});
  const at::Tensor weight = at::randn({96, 96});
  const at::Tensor a = at::randn({1, 8, 96});
  const at::Tensor b = at::randn({1, 96, 8});
  const auto run = [&] { return std::get<0>(gated_lora_linear(x, weight, std::nullopt, a, b, at::ones({1}))); };
  set_kernel_mode(KernelMode::kReference);
  const at::Tensor reference = run();
  EXPECT_TRUE(at::equal(reference, std::get<0>(gated_lora(x, at::linear(x, weight), a, b, at::ones({1})))));
  set_kernel_mode(KernelMode::kFused);
  EXPECT_FALSE(at::equal(run(), reference)) << "the fused kernel rounds as no library's product does";
}

}  // namespace
}  // namespace torchgraft::ops::test
