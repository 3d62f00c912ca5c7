#include <c10/core/GradMode.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_lora_linear.h>
#include <torchgraft/ops/kernel_mode.h>

#include "op_test.h"

namespace torchgraft::ops::test {
namespace {

struct Inputs {
  at::Tensor x = randn({3, 5, 8});
  at::Tensor base = randn({3, 5, 6});
  at::Tensor lora_a = randn({3, 2, 8});
  at::Tensor lora_b = randn({3, 6, 2});
  at::Tensor scaling = randn({3});
  at::Tensor gate_weight = randn({3, 1, 8});
  at::Tensor gate_bias = randn({3, 1});
  at::Tensor token_mask = at::ones({3, 5}, at::kBool);
};

class GatedLora : public testing::TestWithParam<Rows> {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_P(GatedLora, EqualsTheFormulaRowByRow) {
  Inputs in;
  in.token_mask[0].slice(0, 3).fill_(false);
  in.token_mask[2].fill_(false);
  const auto [output, gate] = gated_lora(in.x, in.base, in.lora_a, in.lora_b, in.scaling, in.gate_weight, in.gate_bias,
                                         GetParam().tensor(), GetParam().adapter, in.token_mask);
  for (int64_t row = 0; row < 3; ++row) {
    const int64_t n = GetParam().of(row);
    if (n < 0) {
      EXPECT_TRUE(at::equal(output[row], in.base[row]));
      EXPECT_EQ(gate[row][0].item<double>(), 0.0);
      continue;
    }
    const at::Tensor g = naive_gate(in.x[row], in.gate_weight[n], in.gate_bias[n], in.token_mask[row]);
    const at::Tensor delta_weight = at::mm(in.lora_b[n], in.lora_a[n]);  // [O, I]
    expect_close(gate[row][0], g);
    expect_close(output[row], in.base[row] + in.scaling[n] * g * at::mm(in.x[row], delta_weight.t()));
  }
}

TEST_P(GatedLora, WithoutAGateIsTheGateOfOne) {
  const Inputs in;
  const auto infinite = at::full({3, 1}, std::numeric_limits<double>::infinity(), at::kDouble);
  const auto ids = GetParam().tensor();
  const auto [plain, ones] =
      gated_lora(in.x, in.base, in.lora_a, in.lora_b, in.scaling, {}, {}, ids, GetParam().adapter);
  const auto [open, gate] = gated_lora(in.x, in.base, in.lora_a, in.lora_b, in.scaling,
                                       at::zeros({3, 1, 8}, at::kDouble), infinite, ids, GetParam().adapter);
  expect_close(plain, open);
  EXPECT_TRUE(at::equal(ones, gate));
  for (int64_t row = 0; row < 3; ++row) {
    EXPECT_EQ(ones[row][0].item<double>(), GetParam().of(row) < 0 ? 0.0 : 1.0);
  }
}

TEST_P(GatedLora, HalfPrecisionFollowsDouble) {
  const Inputs in;
  const auto [expected, expected_gate] = gated_lora(in.x, in.base, in.lora_a, in.lora_b, in.scaling, in.gate_weight,
                                                    in.gate_bias, GetParam().tensor(), GetParam().adapter);
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto [output, gate] =
        gated_lora(in.x.to(type), in.base.to(type), in.lora_a.to(type), in.lora_b.to(type), in.scaling.to(type),
                   in.gate_weight.to(type), in.gate_bias.to(type), GetParam().tensor(), GetParam().adapter);
    EXPECT_EQ(output.scalar_type(), type);
    EXPECT_EQ(gate.scalar_type(), type);
    const double tolerance = type == at::kFloat ? 1e-4 : type == at::kHalf ? 1e-2 : 1e-1;
    expect_close(output, expected, tolerance, tolerance);
    expect_close(gate, expected_gate, tolerance, tolerance);
  }
}

TEST_P(GatedLora, BackwardEqualsTheFormulaOfTheGradients) {
  Inputs in;
  for (at::Tensor* tensor : {&in.x, &in.base, &in.lora_a, &in.lora_b, &in.scaling}) {
    tensor->requires_grad_();
  }
  const at::Tensor direction = randn({3, 5, 6});
  const auto [output, gate] =
      gated_lora(in.x, in.base, in.lora_a, in.lora_b, in.scaling, {}, {}, GetParam().tensor(), GetParam().adapter);
  EXPECT_FALSE(gate.requires_grad());
  (output * direction).sum().backward();
  const c10::NoGradGuard no_grad;
  at::Tensor scaling_grad = at::zeros({3}, at::kDouble);
  at::Tensor b_grad = at::zeros({3, 6, 2}, at::kDouble);
  for (int64_t row = 0; row < 3; ++row) {
    const int64_t n = GetParam().of(row);
    if (n >= 0) {
      const at::Tensor hidden = at::mm(in.x[row], in.lora_a[n].t());
      scaling_grad[n] += (direction[row] * at::mm(hidden, in.lora_b[n].t())).sum();
      b_grad[n] += in.scaling[n] * at::mm(direction[row].t(), hidden);
    }
  }
  expect_close(in.base.grad(), direction);
  if (GetParam().ids.empty() && GetParam().adapter < 0) {  // known beforehand that no parameter takes part
    EXPECT_FALSE(in.scaling.grad().defined());
    EXPECT_FALSE(in.lora_b.grad().defined());
    return;
  }
  expect_close(in.scaling.grad(), scaling_grad);
  expect_close(in.lora_b.grad(), b_grad);
}

TEST_P(GatedLora, MetaHasTheSameShape) {
  const Inputs in;
  const auto ids = GetParam().tensor();
  const auto on_meta = [](const at::Tensor& tensor) { return tensor.to(at::kMeta); };
  const auto [output, gate] = gated_lora(
      on_meta(in.x), on_meta(in.base), on_meta(in.lora_a), on_meta(in.lora_b), on_meta(in.scaling), {}, {},
      ids.has_value() ? std::make_optional(on_meta(*ids)) : std::nullopt, GetParam().adapter, on_meta(in.token_mask));
  EXPECT_TRUE(output.is_meta());
  EXPECT_EQ(output.sizes(), at::IntArrayRef({3, 5, 6}));
  EXPECT_EQ(gate.sizes(), at::IntArrayRef({3, 1}));
}

INSTANTIATE_TEST_SUITE_P(Rows, GatedLora, testing::ValuesIn(kRows),
                         [](const auto& info) { return std::string(info.param.name); });

// Tensors of nothing lie at null, which memcpy may not get: UBSan sees it (scripts/test asan).
TEST(FusedLora, OfNoColumnsHasARightSizeBesideBaseRows) {
  set_kernel_mode(KernelMode::kFused);
  const at::Tensor ids = at::tensor({-1, 0, 2}, at::kLong);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const auto of = [type](at::IntArrayRef sizes) { return randn(sizes).to(type); };
    const at::Tensor x = of({3, 5, 8});
    const at::Tensor a = of({3, 2, 8});
    const at::Tensor b = of({3, 0, 2});
    EXPECT_EQ(std::get<0>(gated_lora(x, of({3, 5, 0}), a, b, of({3}), {}, {}, ids)).sizes(),
              at::IntArrayRef({3, 5, 0}));
    EXPECT_EQ(std::get<0>(gated_lora_linear(x, of({0, 8}), {}, a, b, of({3}), {}, {}, ids)).sizes(),
              at::IntArrayRef({3, 5, 0}));
  }
  set_kernel_mode(KernelMode::kAuto);
}

TEST(GatedLoraErrors, NameOpArgumentExpectedAndGot) {
  const Inputs in;
  const auto call = [&in](const at::Tensor& lora_a, const std::optional<at::Tensor>& ids = {}, int64_t adapter = 0) {
    return gated_lora(in.x, in.base, lora_a, in.lora_b, in.scaling, {}, {}, ids, adapter);
  };
  expect_error([&] { call(randn({1, 8, 512})); }, "gated_lora: expected lora_a of shape [N, r, 8], got [1, 8, 512]");
  expect_error([&] { call(in.lora_a.to(at::kHalf)); }, "gated_lora: expected lora_a of dtype Double as x, got Half");
  expect_error([&] { call(in.lora_a.to(at::kMeta)); }, "gated_lora: expected lora_a on cpu as x, got meta");
  expect_error([&] { call(in.lora_a, at::tensor({0, 1, 3}, at::kLong)); },
               "gated_lora: expected adapter_ids in [-1, 3), got 3 in row 2");
  expect_error([&] { call(in.lora_a, {}, 3); }, "gated_lora: expected adapter in [-1, 3), got 3");
}

}  // namespace
}  // namespace torchgraft::ops::test
