#pragma once

#include <torchgraft/plan/structure.h>

#include <c10/util/StringUtil.h>

#include <string>

namespace torchgraft::testing {

// Hidden size 12, 3 heads of 4, feed-forward size 20.
inline Layer attention_layer(AttentionKind kind, const Projection& query, const Projection& key,
                             const Projection& value) {
  Layer layer;
  layer.kind = kind;
  layer.num_heads = layer.num_kv_heads = 3;
  layer.head_dim = 4;
  layer.hidden_size = 12;
  layer.norm_order = NormOrder::kPost;
  layer.query = query;
  layer.key = key;
  layer.value = value;
  layer.output = Projection{"p", 12, 12};
  layer.has_attention_residual = true;
  return layer;
}

inline void add_feed_forward(Layer& layer, const std::string& in, const std::string& out) {
  layer.ffn_in = Projection{in, 12, 20};
  layer.ffn_out = Projection{out, 20, 12};
  layer.has_ffn_residual = true;
}

inline void append(Structure& structure, Layer layer) {
  layer.index = static_cast<int64_t>(structure.layers.size());
  const bool continues = layer.kind == AttentionKind::kCross && layer.index > 0;
  layer.number = continues ? structure.layers.back().number : structure.depth();
  structure.layers.push_back(std::move(layer));
}

// BERT-like layers without telling module paths.
inline Structure bert_like(int64_t layers) {
  Structure structure;
  for (int64_t i = 0; i < layers; ++i) {
    const Projection projection{"p", 12, 12};
    Layer layer = attention_layer(AttentionKind::kSelf, projection, projection, projection);
    add_feed_forward(layer, "in", "out");
    append(structure, layer);
  }
  return structure;
}

// Separate projections q_proj, k_proj and v_proj in the module `path`.
inline Layer attention_at(AttentionKind kind, const std::string& path) {
  return attention_layer(kind, {path + ".q_proj", 12, 12}, {path + ".k_proj", 12, 12}, {path + ".v_proj", 12, 12});
}

// BART-like: `layers` encoder layers, then as many of a decoder, whose feed-forward block follows the cross attention.
inline Structure bart_like(int64_t layers, const std::string& root = "") {
  Structure structure;
  for (int64_t i = 0; i < layers; ++i) {
    const std::string path = c10::str(root, "encoder.layers.", i);
    Layer layer = attention_at(AttentionKind::kEncoder, path + ".self_attn");
    add_feed_forward(layer, path + ".fc1", path + ".fc2");
    append(structure, layer);
  }
  for (int64_t i = 0; i < layers; ++i) {
    const std::string path = c10::str(root, "decoder.layers.", i);
    append(structure, attention_at(AttentionKind::kSelf, path + ".self_attn"));
    Layer cross = attention_at(AttentionKind::kCross, path + ".encoder_attn");
    add_feed_forward(cross, path + ".fc1", path + ".fc2");
    append(structure, cross);
  }
  return structure;
}

}  // namespace torchgraft::testing
