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
void decompose_fused_encoder(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchgraft
