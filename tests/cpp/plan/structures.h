#pragma once

#include <torchgraft/plan/structure.h>

namespace torchgraft::testing {

// BERT-like layers of hidden size 12: 3 heads of 4, feed-forward size 20.
inline Structure bert_like(int64_t layers) {
  Structure structure;
  for (int64_t i = 0; i < layers; ++i) {
    Layer layer;
    layer.index = i;
    layer.num_heads = layer.num_kv_heads = 3;
    layer.head_dim = 4;
    layer.hidden_size = 12;
    layer.norm_order = NormOrder::kPost;
    layer.query = layer.key = layer.value = layer.output = Projection{"p", 12, 12};
    layer.ffn_in = Projection{"in", 12, 20};
    layer.ffn_out = Projection{"out", 20, 12};
    layer.has_attention_residual = layer.has_ffn_residual = true;
    structure.layers.push_back(layer);
  }
  return structure;
}

}  // namespace torchgraft::testing
