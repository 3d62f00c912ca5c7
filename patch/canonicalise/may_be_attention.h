#pragma once

#include <torchgraft/patch/graph/symbolic_shape.h>

#include <torch/csrc/jit/ir/ir.h>

#include <vector>

namespace torchgraft {

// True when `softmax`, which was not rewritten, may be that of an attention layer: its scores compare activations with
// activations (a product, a distance, a sum over two new dimensions), and a linear map, a norm or a product with
// activations reads what comes of it. Others weigh classes, experts or tokens for pooling, or are the model's result.
bool may_be_attention(torch::jit::Node* softmax);

// The non-linearity in place of a softmax, if `product` mixes values by scores that went through one: ReLU attention.
// Null if it does not, as where a mixture of experts applies the two linear maps of each token's expert.
torch::jit::Node* activation_of_scores(torch::jit::Node* product, SymbolicShapes& shapes);

// True when the elements of `value`, not only its shape, depend on a tensor among the graph's inputs. The queries of an
// attention that pools do not.
bool depends_on_inputs(torch::jit::Value* value);

// True when the elements of `value` depend on those of one of `sources`.
bool depends_on(torch::jit::Value* value, const std::vector<torch::jit::Value*>& sources);

}  // namespace torchgraft
