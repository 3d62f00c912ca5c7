#include <torchgraft/plan/structure.h>

#include <torchgraft/plan/locations.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

namespace torchgraft {

const char* to_string(AttentionKind kind) {
  switch (kind) {
    case AttentionKind::kSelf:
      return "self";
    case AttentionKind::kEncoder:
      return "encoder";
    case AttentionKind::kCross:
      return "cross";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown attention kind");
}

const char* to_string(NormOrder order) {
  switch (order) {
    case NormOrder::kPost:
      return "post";
    case NormOrder::kPre:
      return "pre";
    case NormOrder::kNone:
      return "none";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown norm order");
}

namespace {

using Json = nlohmann::ordered_json;

Json to_json(const std::optional<Projection>& projection) {
  if (!projection) {
    return nullptr;
  }
  return {{"path", projection->path},
          {"in_features", projection->in_features},
          {"out_features", projection->out_features},
          {"offset", projection->offset},
          {"packed", projection->packed}};
}

Json to_json(const Layer& layer) {
  return {{"index", layer.index},
          {"kind", to_string(layer.kind)},
          {"num_heads", layer.num_heads},
          {"num_kv_heads", layer.num_kv_heads},
          {"head_dim", layer.head_dim},
          {"hidden_size", layer.hidden_size},
          {"norm_order", to_string(layer.norm_order)},
          {"attention_mask", layer.has_attention_mask},
          {"query", to_json(layer.query)},
          {"key", to_json(layer.key)},
          {"value", to_json(layer.value)},
          {"output", to_json(layer.output)},
          {"ffn_in", to_json(layer.ffn_in)},
          {"ffn_out", to_json(layer.ffn_out)},
          {"locations", available_locations(layer)},
          {"notes", layer.notes}};
}

}  // namespace

std::string to_json(const Structure& structure) {
  Json json = {{"layers", Json::array()}, {"near_misses", structure.near_misses}};
  for (const Layer& layer : structure.layers) {
    json["layers"].push_back(to_json(layer));
  }
  return json.dump();
}

}  // namespace torchgraft
