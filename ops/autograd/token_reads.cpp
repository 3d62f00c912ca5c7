#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/token_reads.h>

namespace torchgraft::ops {
namespace {

// Undefined if there are none.
at::Tensor joined(const std::vector<at::Tensor>& parts, int64_t dim) {
  if (parts.empty()) {
    return {};
  }
  return parts.size() == 1 ? parts.front() : at::cat(parts, dim);
}

}  // namespace

void TokenReads::add(const at::Tensor& grad, const at::Tensor& bank, bool need_weight, at::Tensor& weight) {
  reads_.push_back({grad, bank, need_weight ? &weight : nullptr});
}

void TokenReads::add_gate(const Gate& gate, const at::Tensor& grad, const GateParameters& parameters,
                          const GateInputs<bool>& needs, GateInputs<at::Tensor>& gradients) {
  if (!grad.defined()) {
    return;
  }
  const at::Tensor per_token = (zero_base_rows(selection_, grad) / gate.tokens).unsqueeze(1);  // [B, 1, G]
  const at::Tensor logits = per_token * gate.sigmoids * (1 - gate.sigmoids);                   // [B, S, G]
  add(logits.to(x_.scalar_type()), parameters.weight, needs.weight, gradients.weight);
  if (needs.bias) {
    gradients.bias = select_backward(selection_, parameters.bias, reduce_rows(selection_, logits.sum(1)));
  }
}

at::Tensor TokenReads::backward(bool need_x, const LinearGradient& linear) {
  at::Tensor sum;
  if (need_x) {
    std::vector<at::Tensor> grads;
    std::vector<at::Tensor> weights;
    for (const Read& read : reads_) {
      grads.push_back(read.grad);
      weights.push_back(select(selection_, read.bank));
    }
    sum = input_gradient(selection_, linear, joined(grads, -1), joined(weights, -2));
  }
  std::vector<at::Tensor> grads;
  for (const Read& read : reads_) {
    if (read.weight != nullptr) {
      grads.push_back(read.grad);
    }
  }
  if (grads.empty()) {
    return sum;
  }
  const at::Tensor all = weight_gradient(selection_, joined(grads, -1), x_);  // [(B,) all R, I]
  c10::SymInt first = 0;
  for (const Read& read : reads_) {
    if (read.weight != nullptr) {
      const c10::SymInt count = read.grad.sym_size(-1);
      *read.weight = select_backward(selection_, read.bank, all.narrow_symint(-2, first, count));
      first += count;
    }
  }
  return sum;
}

}  // namespace torchgraft::ops
