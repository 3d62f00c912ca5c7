#pragma once

#include <torch/csrc/jit/ir/ir.h>

namespace torchgraft {

// torch.nn.TransformerEncoder runs eval-mode inference in fused kernels that hide the whole layer, over nested tensors
// when there is padding. This pass writes them out:
//   - a branch into aten::_transformer_encoder_layer_fwd or aten::_native_multi_head_attention (scripted modules) is
//     pinned to the other, unfused side;
//   - the same ops in a straight line (modules traced under no_grad) become linear, scaled_dot_product_attention, layer
//     norms and residual adds;
//   - aten::_nested_tensor_from_mask becomes its dense input with the mask handed to the attentions behind it, and
//     to_padded_tensor sets the padded positions to the padding value, as the nested form does.
// Results agree with the fused form up to rounding. A fused op with inputs that this pass does not cover stays.
// The fused ops take any number in a mask but 0 for "hidden", the unfused sides add it: a scripted module with masks of
// other floats than 0 and -inf has two results, of which this pass keeps the unfused one.
void decompose_fused_encoder(const std::shared_ptr<torch::jit::Graph>& graph);

// Whether `graph`, or what it calls, chooses between a fused op and an unfused side when it runs.
bool may_run_fused_encoder(const torch::jit::Graph& graph);

}  // namespace torchgraft
