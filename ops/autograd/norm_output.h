#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

namespace torchgraft::ops {

// The result of a layer norm need not be kept for a gradient: the norm's own node keeps what it normalised, with means
// and deviations, from which the result is had again by one multiplication and one addition.

// The node of the layer norm whose result `tensor` is, where it can be had again; null otherwise.
c10::intrusive_ptr<torch::autograd::Node> norm_that_made(const at::Tensor& tensor);

// Up to rounding. Throws c10::Error when the node has been used up: a second backward pass without retain_graph.
at::Tensor output_of_norm(const c10::intrusive_ptr<torch::autograd::Node>& norm);

}  // namespace torchgraft::ops
