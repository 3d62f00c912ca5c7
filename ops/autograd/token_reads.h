#pragma once

#include <torchgraft/ops/arguments.h>
#include <torchgraft/ops/autograd/products.h>
#include <torchgraft/ops/autograd/recording.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

#include <vector>

namespace torchgraft::ops {

// The gradients of all products of x [B, S, I] with narrow weights that an operator makes (its down projection, its
// gate), taken together: x's gradient is written once, and x is read once for the gradients of the weights.
class TokenReads {
 public:
  TokenReads(const Selection& selection, const at::Tensor& x) : selection_(selection), x_(x) {}

  // grad [B, S, R] of project(x, select(bank)); bank [N, R, I]. backward() sets `weight`, the bank's gradient, if
  // need_weight.
  void add(const at::Tensor& grad, const at::Tensor& bank, bool need_weight, at::Tensor& weight);

  // grad [B, G], of the gate's value (undefined: nothing flows through it). Sets the bias's gradient at once;
  // backward() sets the weight's.
  void add_gate(const Gate& gate, const at::Tensor& grad, const GateParameters& parameters,
                const GateInputs<bool>& needs, GateInputs<at::Tensor>& gradients);

  // x's gradient, if needed, through everything that was added and through `linear`, if there is one.
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
