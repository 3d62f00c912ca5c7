#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torchgraft/ops/cpu/kernels.h>
#include <torchgraft/ops/cpu/token_tiles.h>

#include <limits>
#include <tuple>
#include <vector>

// The products that pack tokens into lanes, each by itself: of float32, of a widened bfloat16 weight, and by the
// processor's own products of bfloat16, which the operators take in place of the second where there are any.
namespace torchgraft::ops::cpu::test {
namespace {

using Product = void (*)(const DotProduct&);

class FusedTokenProducts : public ::testing::Test {
 protected:
  FusedTokenProducts() { at::manual_seed(0); }

  // x [rows, depth] and w [columns, depth] of float32, w read as `weight`.
  static at::Tensor run(Product product, const at::Tensor& x, const at::Tensor& w, Numbers weight) {
    const at::Tensor y = at::full({x.size(0), w.size(0)}, 77.0F);
    DotProduct job;
    job.rows = x.size(0);
    job.columns = job.y_stride = w.size(0);
    job.depth = job.x_stride = x.size(1);
    job.x = x.const_data_ptr<float>();
    job.x_is_bfloat16 = true;
    job.w = weight;
    job.w_stride = w.stride(0);
    job.w_step = w.stride(1);
    job.y = y.mutable_data_ptr<float>();
    product(job);
    return y;
  }

  // By every kernel there is, of numbers that bfloat16 has.
  static std::vector<at::Tensor> results(const at::Tensor& x, const at::Tensor& w) {
    const at::Tensor bfloat16 = w.to(at::kBFloat16);
    const at::Tensor transposed = w.t().contiguous().t();
    std::vector<at::Tensor> found = {run(kernels().token_product, x, w, w.const_data_ptr<float>()),
                                     run(kernels().token_product, x, transposed, transposed.const_data_ptr<float>()),
                                     run(kernels().token_product, x, w, bfloat16.const_data_ptr<at::BFloat16>()),
                                     run(kernels().dot_product, x, w, w.const_data_ptr<float>())};
    if (kernels().token_product_bfloat16 != nullptr) {
      found.push_back(run(kernels().token_product_bfloat16, x, w, bfloat16.const_data_ptr<at::BFloat16>()));
    }
    return found;
  }

  static at::Tensor random(at::IntArrayRef sizes) { return at::randn(sizes).to(at::kBFloat16).to(at::kFloat); }
};

TEST_F(FusedTokenProducts, OfAnySize) {
  for (const auto& [rows, columns, depth] : {std::tuple(1, 1, 1),
                                             {1, 7, 2},
                                             {9, 6, 3},
                                             {17, 49, 63},
                                             {64, 48, 64},
                                             {65, 13, 65},
                                             {70, 5, 129},
                                             {64, 48, 150},
                                             {16, 50, 600},
                                             {136, 50, 191}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << columns << " x " << depth);
    const at::Tensor x = random({rows, depth});
    const at::Tensor w = random({columns, depth});
    const at::Tensor expected = at::mm(x.to(at::kDouble), w.to(at::kDouble).t());
    for (const at::Tensor& found : results(x, w)) {
      EXPECT_LE((found - expected).abs().max().item<double>(),
                1e-5 * std::max(1.0, expected.abs().max().item<double>()));
    }
  }
}

// The kernels order the two differently: an activation of what is added up so far, or of the product alone.
TEST_F(FusedTokenProducts, BesideAnActivationThereIsNoInit) {
  const at::Tensor x = random({20, 8});
  const at::Tensor w = random({40, 8});
  const at::Tensor y = at::zeros({20, 40});
  for (const int64_t columns : {5, 40}) {
    DotProduct job;
    job.rows = 20;
    job.columns = columns;
    job.init_stride = job.y_stride = 40;
    job.depth = job.x_stride = job.w_stride = 8;
    job.x = x.const_data_ptr<float>();
    job.w = w.const_data_ptr<float>();
    job.init = job.y = y.mutable_data_ptr<float>();
    multiply(job, 20, columns);
    job.activation = FusedActivation::kRelu;
    EXPECT_THROW(multiply(job, 20, columns), c10::Error);
  }
}

// What is not finite stays in its token and its column, also in the last term of an odd number.
TEST_F(FusedTokenProducts, OfNumbersThatAreNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const int64_t rows : {5, 20, 67}) {
    at::Tensor x = random({rows, 33}).abs() + 1;
    at::Tensor w = random({40, 33}).abs() + 1;
    x[rows - 2].fill_(std::numeric_limits<float>::quiet_NaN());
    w[39][32] = kInfinity;
    w[38][31] = -kInfinity;
    for (const at::Tensor& found : results(x, w)) {
      EXPECT_TRUE(found[rows - 2].isnan().all().item<bool>());
      const at::Tensor others = at::cat({found.narrow(0, 0, rows - 2), found.narrow(0, rows - 1, 1)});
      EXPECT_TRUE((others.select(1, 39) == kInfinity).all().item<bool>());
      EXPECT_TRUE((others.select(1, 38) == -kInfinity).all().item<bool>());
      EXPECT_TRUE(others.narrow(1, 0, 38).isfinite().all().item<bool>());
    }
  }
}

}  // namespace
}  // namespace torchgraft::ops::cpu::test
