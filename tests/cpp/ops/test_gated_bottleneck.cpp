#include <c10/core/GradMode.h>
#include <torchgraft/ops/activation.h>
#include <torchgraft/ops/gated_bottleneck.h>

#include "op_test.h"

namespace torchgraft::ops::test {
namespace {

struct Inputs {
  explicit Inputs(int64_t channels = 1) : scaling(randn({3, channels})) {}
  at::Tensor x = randn({3, 5, 8});
  at::Tensor residual = randn({3, 5, 8});
  at::Tensor down_weight = randn({3, 4, 8});
  at::Tensor down_bias = randn({3, 4});
  at::Tensor up_weight = randn({3, 8, 4});
  at::Tensor up_bias = randn({3, 8});
  at::Tensor scaling;
  at::Tensor gate_weight = randn({3, 1, 8});
  at::Tensor gate_bias = randn({3, 1});
  at::Tensor token_mask = at::ones({3, 5}, at::kBool);
};

std::tuple<at::Tensor, at::Tensor> call(const Inputs& in, const Rows& rows, std::string_view non_linearity = "relu") {
  return gated_bottleneck(in.x, in.residual, in.down_weight, in.down_bias, in.up_weight, in.up_bias, in.scaling,
                          non_linearity, in.gate_weight, in.gate_bias, rows.tensor(), rows.adapter, in.token_mask);
}

class GatedBottleneck : public testing::TestWithParam<Rows> {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_P(GatedBottleneck, EqualsTheFormulaRowByRow) {
  for (const int64_t channels : {1, 8}) {
    Inputs in(channels);
    in.token_mask[1].slice(0, 2).fill_(false);
    const auto [output, gate] = call(in, GetParam());
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t n = GetParam().of(row);
      if (n < 0) {
        EXPECT_TRUE(at::equal(output[row], in.residual[row]));
        EXPECT_EQ(gate[row][0].item<double>(), 0.0);
        continue;
      }
      const at::Tensor g = naive_gate(in.x[row], in.gate_weight[n], in.gate_bias[n], in.token_mask[row]);
      const at::Tensor hidden = at::relu(at::mm(in.x[row], in.down_weight[n].t()) + in.down_bias[n]);
      const at::Tensor update = at::mm(hidden, in.up_weight[n].t()) + in.up_bias[n];
      expect_close(gate[row][0], g);
      expect_close(output[row], in.residual[row] + in.scaling[n] * g * update);
    }
  }
}

TEST_P(GatedBottleneck, BackwardEqualsATensDerivative) {
  Inputs in(8);
  at::Tensor direction = randn({3, 5, 8});
  in.up_weight.requires_grad_();
  in.gate_bias.requires_grad_();
  const auto [output, gate] = call(in, GetParam(), "tanh");
  (output * direction).sum().backward();
  const at::Tensor analytical = in.up_weight.grad();
  const at::Tensor analytical_bias = in.gate_bias.grad();
  const c10::NoGradGuard no_grad;
  // Central differences of one entry per adapter.
  const auto loss = [&] { return (std::get<0>(call(in, GetParam(), "tanh")) * direction).sum().item<double>(); };
  const auto slope = [&](const at::Tensor& entry) {
    constexpr double kStep = 1e-6;
    entry.add_(kStep);
    const double above = loss();
    entry.sub_(2 * kStep);
    const double below = loss();
    entry.add_(kStep);
    return (above - below) / (2 * kStep);
  };
  for (int64_t n = 0; n < 3; ++n) {
    const double weight = analytical.defined() ? analytical[n][3][1].item<double>() : 0.0;
    const double bias = analytical_bias.defined() ? analytical_bias[n][0].item<double>() : 0.0;
    EXPECT_NEAR(slope(in.up_weight.detach()[n][3][1]), weight, 1e-6);
    EXPECT_NEAR(slope(in.gate_bias.detach()[n][0]), bias, 1e-6);
  }
}

TEST_P(GatedBottleneck, MetaHasTheSameShape) {
  Inputs in;
  for (at::Tensor* tensor : {&in.x, &in.residual, &in.down_weight, &in.down_bias, &in.up_weight, &in.up_bias,
                             &in.scaling, &in.gate_weight, &in.gate_bias, &in.token_mask}) {
    *tensor = tensor->to(at::kMeta);
  }
  Rows rows = GetParam();
  rows.ids.clear();  // one adapter for all: the ids would have to be on meta, too
  const auto [output, gate] = call(in, rows);
  EXPECT_TRUE(output.is_meta());
  EXPECT_EQ(output.sizes(), at::IntArrayRef({3, 5, 8}));
  EXPECT_EQ(gate.sizes(), at::IntArrayRef({3, 1}));
}

INSTANTIATE_TEST_SUITE_P(Rows, GatedBottleneck, testing::ValuesIn(kRows),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(GatedBottleneckNonLinearity, EveryNameRunsAndDiffers) {
  at::manual_seed(0);
  const Inputs in;
  const Rows rows{"first", {}, 0};
  const at::Tensor linear = std::get<0>(call(in, rows, "linear"));
  for (const std::string& name : non_linearity_names()) {
    const at::Tensor output = std::get<0>(call(in, rows, name));
    EXPECT_EQ(at::equal(output, linear), name == "linear") << name;
  }
  EXPECT_TRUE(std::is_sorted(non_linearity_names().begin(), non_linearity_names().end()));
}

TEST(GatedBottleneckErrors, NameOpArgumentExpectedAndGot) {
  const Rows rows{"first", {}, 0};
  Inputs in;
  in.scaling = randn({3, 2});
  expect_error([&] { call(in, rows); }, "gated_bottleneck: expected scaling of shape [3, 1] or [3, 8], got [3, 2]");
  in = Inputs();
  in.up_weight = randn({3, 4, 8});
  expect_error([&] { call(in, rows); }, "gated_bottleneck: expected up_weight of shape [3, 8, 4], got [3, 4, 8]");
  in = Inputs();
  try {
    call(in, rows, "softmax");
    ADD_FAILURE() << "softmax is no elementwise function";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.msg()).find("one of gelu, gelu_10,"), std::string::npos);
    EXPECT_NE(std::string(error.msg()).find("got \"softmax\""), std::string::npos);
  }
}

}  // namespace
}  // namespace torchgraft::ops::test
