#include "op_test.h"

#include <ATen/Parallel.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/linear.h>

#include <cmath>

namespace torchgraft::ops::test {
namespace {

class FusedLinear : public ::testing::Test {
 protected:
  FusedLinear() { at::manual_seed(0); }
  ~FusedLinear() override { set_kernel_mode(KernelMode::kAuto); }
};

// On sizes that fit no register block, for every function.
TEST_F(FusedLinear, TheFusedKernelEqualsTheFormula) {
  set_kernel_mode(KernelMode::kFused);
  for (const std::string& function : non_linearity_names()) {
    for (const int64_t tokens : {1, 17, 70}) {
      for (const int64_t columns : {5, 49, 101}) {
        const int64_t depth = tokens == 1 ? 37 : columns == 49 ? 150 : 600;  // of which a part is 128 terms, or 512
        SCOPED_TRACE(c10::str(function, ", ", tokens, " tokens, ", columns, " columns, ", depth, " terms"));
        const at::Tensor x = randn({2, tokens, depth});
        const at::Tensor weight = randn({columns, depth}) / std::sqrt(depth);
        const at::Tensor bias = randn({columns});
        const at::Tensor wanted = find_activation(function).forward(at::linear(x, weight, bias));
        const at::Tensor got = linear(x.to(at::kFloat), weight.to(at::kFloat), bias.to(at::kFloat), function);
        EXPECT_TRUE(at::allclose(got.to(at::kDouble), wanted, 1e-4, 1e-4));
        const at::Tensor matrix = linear(x[0].to(at::kFloat), weight.to(at::kFloat), bias.to(at::kFloat), function);
        EXPECT_TRUE(at::allclose(matrix, got[0], 1e-5, 1e-5));
      }
    }
  }
}

TEST_F(FusedLinear, ARowHasTheSameBitsInEveryBatchAndForAnyNumberOfThreads) {
  set_kernel_mode(KernelMode::kFused);
  const at::Tensor x = at::randn({5, 20, 600});
  const at::Tensor weight = at::randn({48, 600});
  const at::Tensor together = linear(x, weight, std::nullopt, "gelu");
  const int threads = at::get_num_threads();
  at::set_num_threads(3);
  for (int64_t row = 0; row < 5; ++row) {
    EXPECT_TRUE(at::equal(linear(x.narrow(0, row, 1), weight, std::nullopt, "gelu")[0], together[row]));
  }
  at::set_num_threads(threads);
}

TEST_F(FusedLinear, TheReferenceIsAtensTwoCalls) {
  set_kernel_mode(KernelMode::kReference);
  const at::Tensor x = at::randn({2, 20, 64});
  const at::Tensor weight = at::randn({48, 64});
  const at::Tensor bias = at::randn({48});
  EXPECT_TRUE(at::equal(linear(x, weight, bias, "gelu"), at::gelu(at::linear(x, weight, bias))));
}

TEST_F(FusedLinear, AWeightThatLiesInSteps) {
  for (const KernelMode mode : {KernelMode::kFused, KernelMode::kReference}) {
    set_kernel_mode(mode);
    const at::Tensor x = at::randn({2, 20, 64});
    const at::Tensor weight = at::randn({64, 48}).t();
    EXPECT_TRUE(at::allclose(ops::linear(x, weight), at::linear(x, weight), 1e-4, 1e-4));
  }
}

}  // namespace
}  // namespace torchgraft::ops::test
