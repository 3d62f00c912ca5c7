#pragma once

#include "op_test.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torchgraft/ops/kernel_mode.h>

#include <algorithm>
#include <functional>

// Gradients in float32 with the fused CPU kernels against ATen's composition in float64 (which the Python tests hold to
// numerical derivatives), on sizes that fit no block.
namespace torchgraft::ops::test {

using Result = std::tuple<at::Tensor, at::Tensor>;
using Tensors = std::vector<at::Tensor>;

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
  static Tensors gradients(const Call& call, at::ScalarType type, KernelMode mode,
                           const std::vector<size_t>& wanted = {}, Weights weights = {}) {
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

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

// 0: all rows use adapter 1; 1: one each, some -1; 2: the last one for all.
inline std::optional<at::Tensor> ids_of(int64_t kind, int64_t batch) {
  if (kind == 0) {
    return std::nullopt;
  }
  return kind == 1 ? at::randint(-1, 3, {batch}, at::kLong) : at::full({batch}, 2, at::kLong);
}

inline at::Tensor if_gated(bool gated, at::IntArrayRef sizes) { return gated ? randn(sizes) : at::Tensor(); }

}  // namespace torchgraft::ops::test
