#include "fused_gradients.h"

#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/gated_prefix_attention.h>

#include <limits>

// Prefix attention, and gradients that come in as views.
namespace torchgraft::ops::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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
  Call linear{
      "lora_linear", {randn({2, 17, 40}), randn({35, 40}), randn({1, 3, 40}), randn({1, 35, 3}), randn({1})}, {}};
  linear.run = [](const Tensors& t) { return gated_lora_linear(t[0], t[1], std::nullopt, t[2], t[3], t[4]); };
  for (const Call& call : {attention_call({2, 3, 3, 11, 11, 8, 4}, 1), linear}) {
    SCOPED_TRACE(call.name);
    expect_same(summed(call, at::kFloat, KernelMode::kFused), summed(call, at::kDouble, KernelMode::kReference));
  }
}

}  // namespace
}  // namespace torchgraft::ops::test
