#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/autograd/products.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

#include <vector>

namespace torchgraft::ops {

// The gradients of all that an op reads off x [B, S, I] by narrow weights (its down projection, its gate), taken
// together: x's gradient is written once, and x is read once for those of the weights.
class TokenReads {
 public:
  TokenReads(const Selection& selection, const at::Tensor& x) : selection_(selection), x_(x) {}

  // grad [B, S, R] of project(x, select(bank)); bank [N, R, I]. backward() sets `weight` if need_weight.
  void add(const at::Tensor& grad, const at::Tensor& bank, bool need_weight, at::Tensor& weight);

  // grad [B, G], of the gate's value (undefined: nothing flows through it). Sets `bias` at once, and `weight` as above.
  void add_gate(const Gate& gate, const at::Tensor& grad, const RowArguments& rows, bool need_weight, bool need_bias,
                at::Tensor& weight, at::Tensor& bias);

  // x's gradient, if needed: also of `linear`, which reads x, too.
  at::Tensor backward(bool need_x, const LinearGradient& linear = {});

 private:
  struct Read {
    at::Tensor grad;
    at::Tensor bank;
    at::Tensor* weight;  // null: not asked for
  };

  const Selection& selection_;
  at::Tensor x_;
  std::vector<Read> reads_;
};

}  // namespace torchgraft::ops
