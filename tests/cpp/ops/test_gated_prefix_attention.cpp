#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/gated_prefix_attention.h>

#include "op_test.h"

namespace torchgraft::ops::test {
namespace {

constexpr double kHidden = -std::numeric_limits<double>::infinity();

struct Inputs {
  explicit Inputs(int64_t heads = 4, int64_t kv_heads = 4, int64_t keys = 5)
      : query(randn({3, heads, 5, 2})),
        key(randn({3, kv_heads, keys, 2})),
        value(randn({3, kv_heads, keys, 2})),
        prefix_key(randn({3, kv_heads, 3, 2})),
        prefix_value(randn({3, kv_heads, 3, 2})) {}
  at::Tensor query, key, value;
  at::Tensor x = randn({3, 5, 6});
  at::Tensor prefix_key, prefix_value;
  at::Tensor prefix_length = at::tensor({3, 0, 2}, at::kLong);
  at::Tensor gate_weight = randn({3, 2, 6});
  at::Tensor gate_bias = randn({3, 2});
  std::optional<at::Tensor> attn_mask;
  bool is_causal = false;
};

std::tuple<at::Tensor, at::Tensor> call(const Inputs& in, const Rows& rows) {
  return gated_prefix_attention(in.query, in.key, in.value, in.x, in.prefix_key, in.prefix_value, in.prefix_length,
                                in.attn_mask, 0.0, in.is_causal, std::nullopt,
                                /*enable_gqa=*/in.query.size(1) != in.key.size(1), in.gate_weight, in.gate_bias,
                                rows.tensor(), rows.adapter);
}

// One row by concatenation, one head and query after the other. mask: additive [S, S_k].
at::Tensor naive_row(const Inputs& in, int64_t row, int64_t adapter, const at::Tensor& mask) {
  const int64_t heads = in.query.size(1);
  at::Tensor output = at::zeros({heads, in.query.size(2), 2}, at::kDouble);
  const int64_t used = adapter < 0 ? 0 : in.prefix_length[adapter].item<int64_t>();
  const at::Tensor all = at::ones({in.x.size(1)}, at::kBool);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t kv_head = head / (heads / in.key.size(1));
    at::Tensor keys = in.key[row][kv_head];
    at::Tensor values = in.value[row][kv_head];
    if (used > 0) {
      const at::Tensor on_keys =
          naive_gate(in.x[row], in.gate_weight[adapter].slice(0, 0, 1), in.gate_bias[adapter].slice(0, 0, 1), all);
      const at::Tensor on_values =
          naive_gate(in.x[row], in.gate_weight[adapter].slice(0, 1, 2), in.gate_bias[adapter].slice(0, 1, 2), all);
      keys = at::cat({on_keys * in.prefix_key[adapter][kv_head].slice(0, 0, used), keys});
      values = at::cat({on_values * in.prefix_value[adapter][kv_head].slice(0, 0, used), values});
    }
    for (int64_t query = 0; query < in.query.size(2); ++query) {
      const at::Tensor bias = at::cat({at::zeros({used}, at::kDouble), mask[query]});
      const at::Tensor weights = at::exp(at::mv(keys, in.query[row][head][query]) / std::sqrt(2.0) + bias);
      if (weights.sum().item<double>() > 0) {
        output[head][query] = at::mv(values.t(), weights / weights.sum());
      }
    }
  }
  return output;
}

class GatedPrefixAttention : public testing::TestWithParam<Rows> {
 protected:
  void SetUp() override { at::manual_seed(0); }
  void expect_naive(const Inputs& in, const at::Tensor& mask) const {  // mask: additive [B, S, S_k]
    const at::Tensor output = std::get<0>(call(in, GetParam()));
    EXPECT_TRUE(output.transpose(1, 2).is_contiguous());
    for (int64_t row = 0; row < 3; ++row) {
      expect_close(output[row], naive_row(in, row, GetParam().of(row), mask[row]));
    }
  }
};

TEST_P(GatedPrefixAttention, EqualsConcatenation) {
  const Inputs in;
  expect_naive(in, at::zeros({3, 5, 5}, at::kDouble));
}

TEST_P(GatedPrefixAttention, SharesKeysBetweenGroupsOfHeads) {
  const Inputs in(/*heads=*/4, /*kv_heads=*/2);
  expect_naive(in, at::zeros({3, 5, 5}, at::kDouble));
}

TEST_P(GatedPrefixAttention, ShowsThePrefixUnderACausalMask) {
  Inputs in(4, 4, /*keys=*/7);
  in.is_causal = true;
  const at::Tensor future = at::ones({5, 7}, at::kBool).tril().logical_not();
  expect_naive(in, at::zeros({3, 5, 7}, at::kDouble).masked_fill(future, kHidden));
}

TEST_P(GatedPrefixAttention, ShowsThePrefixWhereEveryKeyIsMasked) {
  Inputs in;
  at::Tensor visible = at::ones({3, 1, 5, 5}, at::kBool);
  visible[0][0][2].fill_(false);  // one query sees no key
  visible[1].fill_(false);        // no query of row 1 sees any
  visible[2][0].slice(1, 4).fill_(false);
  const at::Tensor mask = at::zeros({3, 5, 5}, at::kDouble).masked_fill(visible.squeeze(1).logical_not(), kHidden);
  in.attn_mask = visible;
  expect_naive(in, mask);
  in.attn_mask = mask.unsqueeze(1);
  expect_naive(in, mask);
}

TEST_P(GatedPrefixAttention, NeedsNoKeysAndNoPrefix) {
  const Inputs no_keys(4, 4, /*keys=*/0);
  expect_naive(no_keys, at::zeros({3, 5, 0}, at::kDouble));
  Inputs no_prefix;
  no_prefix.prefix_key = no_prefix.prefix_key.slice(2, 0, 0);
  no_prefix.prefix_value = no_prefix.prefix_value.slice(2, 0, 0);
  no_prefix.prefix_length.zero_();
  expect_naive(no_prefix, at::zeros({3, 5, 5}, at::kDouble));
}

TEST_P(GatedPrefixAttention, RecordsTheSameOutput) {
  for (const int64_t keys : {5, 0}) {
    Inputs in(4, 4, keys);
    const at::Tensor expected = std::get<0>(call(in, GetParam()));
    in.query.requires_grad_();
    in.prefix_value.requires_grad_();
    const at::Tensor output = std::get<0>(call(in, GetParam()));
    EXPECT_TRUE(output.requires_grad());
    expect_close(output.detach(), expected);
    output.sum().backward();
    EXPECT_TRUE(in.query.grad().isfinite().all().item<bool>());
    // The sum of one row's output grows by the total weight of a position: its gradient is the gate times that.
    for (int64_t n = 0; n < 3 && in.prefix_value.grad().defined(); ++n) {
      const int64_t used = in.prefix_length[n].item<int64_t>();
      EXPECT_FALSE(in.prefix_value.grad()[n].slice(1, used).any().item<bool>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, GatedPrefixAttention, testing::ValuesIn(kRows),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(GatedPrefixAttentionErrors, NameOpArgumentExpectedAndGot) {
  const Rows rows{"first", {}, 0};
  Inputs in;
  in.prefix_key = randn({3, 2, 3, 2});
  expect_error([&] { call(in, rows); },
               "gated_prefix_attention: expected prefix_key of shape [N, 4, P, 2], got [3, 2, 3, 2]");
  in = Inputs();
  in.attn_mask = randn({5, 4});
  expect_error([&] { call(in, rows); },
               "gated_prefix_attention: expected attn_mask that broadcasts to [3, 4, 5, 5], got [5, 4]");
  in = Inputs(/*heads=*/5, /*kv_heads=*/2);
  expect_error([&] { call(in, rows); },
               "gated_prefix_attention: expected query heads that are a multiple of the 2 key/value heads, got 5");
}

TEST(AttentionTokenMask, ReadsBoolAndFloatMasksAlike) {
  const at::Tensor x = at::zeros({2, 3, 4});
  EXPECT_TRUE(attention_token_mask(x).all().item<bool>());
  at::Tensor real = at::ones({2, 3}, at::kBool);
  real[1][2] = false;
  const at::Tensor padding = real.view({2, 1, 1, 3});
  EXPECT_TRUE(at::equal(attention_token_mask(x, padding), real));
  for (const double low : {kHidden, static_cast<double>(std::numeric_limits<float>::lowest())}) {
    EXPECT_TRUE(
        at::equal(attention_token_mask(x, at::zeros({2, 1, 1, 3}).masked_fill(padding.logical_not(), low)), real));
  }
  expect_error([&] { attention_token_mask(x, at::zeros({3, 2})); },
               "attention_token_mask: expected attn_mask that broadcasts to [2, h, S_q, 3], got [3, 2]");
}

}  // namespace
}  // namespace torchgraft::ops::test
