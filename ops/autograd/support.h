#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/gate.h>

#include <initializer_list>

namespace torchgraft::ops {

// What the gradients of the ops share.

// Whether a graph is to be recorded: otherwise the op is only dispatched on, and nothing is saved.
bool records_gradient(std::initializer_list<at::Tensor> differentiable);

// What Function::apply takes for an argument that may be absent.
std::optional<at::Tensor> or_none(const at::Tensor& tensor);

// `arguments`: the op's differentiable arguments, in the order in which Function::apply takes them before all others
// (an absent one undefined). Saves a selection and a gate behind an op's own `tensors`, and takes them back. Saved
// tensors keep their order. The result of a layer norm is not kept but had again (norm_output.h).
void save(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& arguments,
          torch::autograd::variable_list tensors, const Selection& selection, const Gate& gate);

struct Saved {
  // Whether the gradient of differentiable argument number `argument` is asked for.
  bool needs(size_t argument) const;
  bool needs_any(std::initializer_list<size_t> arguments) const;

  torch::autograd::AutogradContext* ctx = nullptr;
  std::vector<int64_t> edges;  // of each differentiable argument; -1: it was absent
  torch::autograd::variable_list tensors;
  Selection selection;
  Gate gate;
};

// Also refuses double backward, which would silently miss what flows through saved intermediates.
Saved restore(const char* op, torch::autograd::AutogradContext* ctx);

// left + right, where either may be undefined (no gradient).
at::Tensor accumulate(const at::Tensor& left, const at::Tensor& right);

}  // namespace torchgraft::ops
