#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// What the patcher found in a graph, free of graph types: a user can print, save and edit it, and give it back.

// What an attention reads. kEncoder: self attention in an encoder-decoder's encoder.
enum class AttentionKind { kSelf, kEncoder, kCross };

// Where a block has its norm: after the residual add, before the block, or nowhere.
enum class NormOrder { kPost, kPre, kNone };

// Where keys and values of earlier passes come from: nowhere; they stand beside this pass's (torch.cat); this pass's
// are written into their places of a tensor of fixed length; or all keys and values are of earlier passes, as those of
// an encoder's tokens are in the steps of a decoder.
enum class CacheKind { kNone, kGrowing, kStatic, kFilled };

// One linear map inside a layer.
struct Projection {
  std::string path;  // module path from the root, e.g. "encoder.layer.0.attention.self.query"
  int64_t in_features = 0;
  int64_t out_features = 0;   // of this projection alone, even when it is packed with others
  int64_t offset = 0;         // first output column inside a packed weight (0 when it stands alone)
  bool packed = false;        // shares its weight with other projections (qkv in one)
  bool is_embedding = false;  // a table of in_features rows, outside of the layers: one is looked up for each token
};

// One attention and what belongs to it. hidden_size is the width of the residual stream. A location whose projection or
// residual add was not found is absent; `notes` give the reason.
struct Layer {
  int64_t index = 0;              // position in Structure::layers: attentions in execution order
  int64_t number = 0;             // of the Transformer layer; a decoder layer's self and cross attention share it
  std::optional<int64_t> shares;  // index of the first attention that runs the same weights (ALBERT), if not this one
  // Layers of one stack run one behind the other. An encoder and its decoder are two, and so are the towers of CLIP.
  int64_t stack = 0;
  AttentionKind kind = AttentionKind::kSelf;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // fewer than num_heads under grouped-query attention
  int64_t head_dim = 0;
  int64_t hidden_size = 0;
  NormOrder norm_order = NormOrder::kNone;      // of the attention block
  NormOrder ffn_norm_order = NormOrder::kNone;  // of the feed-forward block
  std::optional<Projection> query, key, value, output;
  std::optional<Projection> ffn_in, ffn_gate, ffn_out;  // ffn_gate: in act(gate(x)) * in(x), the one with activation
  std::vector<Projection> linear_maps;                  // of the first layer: linear maps with no role in any layer
  bool has_attention_residual = false;                  // a residual add after `output`: the site of mh_adapter
  bool has_ffn_residual = false;                        // a residual add after `ffn_out`: the site of output_adapter
  bool has_attention_mask = false;
  bool has_relative_scores = false;  // what is added to the scores depends on queries or keys: relative positions
  bool has_core = true;              // false: sites describe the projections of an attention that was not recognised
  bool is_brief = false;  // of edited sites, without a core: they name projections, and the rest is to be found
  bool has_end = false;   // the one value that leaves the Transformer layer is known: the site of output_reft
  std::string end_note;   // why it is not, in words
  CacheKind cache = CacheKind::kNone;  // kFilled: without key and value, which another pass has projected
  std::vector<std::string> notes;      // what is missing and why, in words
};

// All that was found in a model.
struct Structure {
  std::vector<Layer> layers;
  // The width of the embeddings, which an invertible adapter changes; 0 where they were not found, and why.
  int64_t embedding_size = 0;
  std::string embedding_note;
  bool has_output_embeddings = false;    // a linear map from them to the vocabulary
  std::string several_outputs;           // the paths of several such maps, of which none was taken
  std::string other_outputs;             // without such a map: the paths of last maps to other numbers of outputs
  std::vector<std::string> near_misses;  // "at encoder.layer.3: softmax without a matmul after it (...)"

  // The number of Transformer layers: Layer::number is below it.
  int64_t depth() const;

  // Position in `layers` of the layer with this Layer::index. The two differ when sites were edited.
  size_t position(int64_t index) const;
};

// The words for them in JSON: "self", "pre", "growing".
TORCHGRAFT_PATCH_API const char* to_string(AttentionKind kind);
TORCHGRAFT_PATCH_API const char* to_string(NormOrder order);
TORCHGRAFT_PATCH_API const char* to_string(CacheKind cache);

// JSON text, one object per layer: what `inspect --json` prints.
TORCHGRAFT_PATCH_API std::string to_json(const Structure& structure);

// The inverse. Does not read near misses, locations, embeddings and notes: they are conclusions. Throws c10::Error,
// naming the layer and the field, when the text is not such JSON.
TORCHGRAFT_PATCH_API Structure structure_from_json(const std::string& text);

}  // namespace torchgraft
