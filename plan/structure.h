#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// What the patcher found in a graph, free of graph types: it can be printed, saved and compared.

enum class AttentionKind { kSelf, kEncoder, kCross };  // kEncoder: self attention in an encoder-decoder's encoder
enum class NormOrder { kPost, kPre, kNone };           // norm after the residual add, before the block, or neither

// One linear map inside a layer.
struct Projection {
  std::string path;  // module path from the root, e.g. "encoder.layer.0.attention.self.query"
  int64_t in_features = 0;
  int64_t out_features = 0;  // of this projection alone, also when it is packed with others
  int64_t offset = 0;        // first output column inside a packed weight (0 when it stands alone)
  bool packed = false;       // shares its weight with other projections (qkv in one)
};

// One attention core and what belongs to it, numbered in execution order. hidden_size is the width of the residual
// stream; locations whose projection or residual branch was not found are absent, with the reason in `notes`.
struct Layer {
  int64_t index = 0;
  AttentionKind kind = AttentionKind::kSelf;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // fewer than num_heads under grouped-query attention
  int64_t head_dim = 0;
  int64_t hidden_size = 0;
  NormOrder norm_order = NormOrder::kNone;
  std::optional<Projection> query, key, value, output;
  std::optional<Projection> ffn_in, ffn_out;
  bool has_attention_residual = false;  // a residual add after `output`: mh_adapter has its place
  bool has_ffn_residual = false;        // a residual add after `ffn_out`: output_adapter has its place
  bool has_attention_mask = false;
  std::vector<std::string> notes;  // what is missing and why, in words
};

struct Structure {
  std::vector<Layer> layers;
  std::vector<std::string> near_misses;  // "at encoder.layer.3: softmax without a matmul after it (...)"
};

TORCHGRAFT_PATCH_API const char* to_string(AttentionKind kind);
TORCHGRAFT_PATCH_API const char* to_string(NormOrder order);

// JSON text, one object per layer: what `inspect --json` prints.
TORCHGRAFT_PATCH_API std::string to_json(const Structure& structure);

}  // namespace torchgraft
