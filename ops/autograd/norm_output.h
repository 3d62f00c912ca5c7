#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

namespace torchgraft::ops {

// A gradient need not keep the result of a layer norm. The norm's own node keeps the norm's input, means and
// deviations; one multiplication and one addition compute the result from them again.

// The node of the layer norm that made `tensor`, if the result can be recomputed as precisely as it was: means and
// deviations are float32 or float64, nothing has changed `tensor` in place since, and no hooks (of checkpointing, say)
// count how often the node's tensors are read. Otherwise null: the gradient has to keep `tensor`. A change behind
// autograd's back (`tensor.data`) goes unnoticed.
c10::intrusive_ptr<torch::autograd::Node> norm_node_of(const at::Tensor& tensor);

// The norm's result, up to rounding. Throws c10::Error if another backward pass without retain_graph has freed the
// node's tensors.
at::Tensor recompute_norm_output(const c10::intrusive_ptr<torch::autograd::Node>& norm);

}  // namespace torchgraft::ops
