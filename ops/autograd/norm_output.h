#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

namespace torchgraft::ops {

// The result of a layer norm need not be kept for a gradient: the norm's own node keeps what it normalised, with means
// and deviations, from which the result is had again by one multiplication and one addition.

// The node of the layer norm whose result `tensor` is, where it can be had again as exactly as it was: means and
// deviations are float32 or float64, nothing has changed `tensor` in place since, and no hooks (of checkpointing, say)
// count how often the node's tensors are read. Null otherwise: `tensor` is to be kept. What was changed behind
// autograd's back (`tensor.data`) is not seen.
c10::intrusive_ptr<torch::autograd::Node> norm_that_made(const at::Tensor& tensor);

// Up to rounding. Throws c10::Error when another backward pass without retain_graph has used the node up.
at::Tensor output_of_norm(const c10::intrusive_ptr<torch::autograd::Node>& norm);

}  // namespace torchgraft::ops
