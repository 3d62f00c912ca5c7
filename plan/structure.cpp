#include <torchgraft/plan/structure.h>

#include <torchgraft/plan/locations.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <utility>

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

const char* to_string(CacheKind cache) {
  switch (cache) {
    case CacheKind::kNone:
      return "none";
    case CacheKind::kGrowing:
      return "growing";
    case CacheKind::kStatic:
      return "static";
    case CacheKind::kFilled:
      return "filled";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown kind of cache");
}

namespace {

using OrderedJson = nlohmann::ordered_json;

OrderedJson to_json(const std::optional<Projection>& projection) {
  if (!projection) {
    return nullptr;
  }
  return {{"path", projection->path},
          {"in_features", projection->in_features},
          {"out_features", projection->out_features},
          {"offset", projection->offset},
          {"packed", projection->packed}};
}

// The roles of a layer's projections, with their JSON keys.
const std::vector<std::pair<const char*, std::optional<Projection> Layer::*>> kRoles = {
    {"query", &Layer::query},   {"key", &Layer::key},           {"value", &Layer::value},    {"output", &Layer::output},
    {"ffn_in", &Layer::ffn_in}, {"ffn_gate", &Layer::ffn_gate}, {"ffn_out", &Layer::ffn_out}};

// Without what is to be found, so that it is read as it was written.
OrderedJson brief_to_json(const Layer& layer) {
  OrderedJson json = {{"index", nullptr}, {"layer", layer.number}, {"kind", to_string(layer.kind)}};
  for (const auto& [key, projection] : kRoles) {
    if (layer.*projection) {
      json[key] = to_json(layer.*projection);
    }
  }
  return json;
}

OrderedJson to_json(const Layer& layer) {
  if (layer.is_brief) {
    return brief_to_json(layer);
  }
  OrderedJson json = {{"index", layer.has_core ? OrderedJson(layer.index) : OrderedJson(nullptr)},
                      {"layer", layer.number},
                      {"shares", layer.shares ? OrderedJson(*layer.shares) : OrderedJson(nullptr)},
                      {"stack", layer.stack},
                      {"kind", to_string(layer.kind)},
                      {"num_heads", layer.num_heads},
                      {"num_kv_heads", layer.num_kv_heads},
                      {"head_dim", layer.head_dim},
                      {"hidden_size", layer.hidden_size},
                      {"norm_order", to_string(layer.norm_order)},
                      {"ffn_norm_order", to_string(layer.ffn_norm_order)},
                      {"attention_mask", layer.has_attention_mask},
                      {"relative_scores", layer.has_relative_scores},
                      {"cache", to_string(layer.cache)}};
  for (const auto& [key, projection] : kRoles) {
    json[key] = to_json(layer.*projection);
  }
  json["attention_residual"] = layer.has_attention_residual;
  json["ffn_residual"] = layer.has_ffn_residual;
  json["locations"] = available_locations(layer);
  json["notes"] = layer.notes;
  return json;
}

// Reads one object of the JSON. Its name is for error messages: "sites: layer 3: query".
class FieldReader {
 public:
  FieldReader(const OrderedJson& json, std::string name) : json_(json), name_(std::move(name)) {
    TORCH_CHECK(json.is_object(), name_, ": expected an object, got ", json.type_name());
  }

  template <typename T>
  T get(const char* key) const {
    TORCH_CHECK(json_.contains(key), name_, ": the field \"", key, "\" is missing");
    try {
      // The library takes true for 1, and 2.5 for 2.
      constexpr bool kIsNumber = std::is_same_v<T, int64_t>;
      TORCH_CHECK(!kIsNumber || json_.at(key).is_number_integer(), name_, ": the field \"", key, "\" cannot be ",
                  shown_json(json_.at(key)));
      // Products of two sizes fit into int64_t.
      const bool is_large = json_.at(key).is_number_unsigned() && json_.at(key).get<uint64_t>() > INT32_MAX;
      TORCH_CHECK(!is_large, name_, ": expected \"", key, "\" below 2^31, got ", shown_json(json_.at(key)));
      return json_.at(key).get<T>();
    } catch (const OrderedJson::exception&) {
      TORCH_CHECK(false, name_, ": the field \"", key, "\" cannot be ", shown_json(json_.at(key)));
    }
  }

  template <typename Enum>
  Enum one_of(const char* key, std::initializer_list<Enum> values) const {
    const auto text = get<std::string>(key);
    std::string names;
    for (const Enum value : values) {
      if (text == to_string(value)) {
        return value;
      }
      names += (names.empty() ? "" : ", ") + std::string(to_string(value));
    }
    TORCH_CHECK(false, name_, ": expected \"", key, "\" to be one of ", names, ", got \"", text, "\"");
  }

  // `is_brief`: sizes may be left out. They are 0 then.
  std::optional<Projection> projection(const char* key, bool is_brief) const {
    if (!json_.contains(key) || json_.at(key).is_null()) {
      return std::nullopt;
    }
    const FieldReader inner(json_.at(key), name_ + ": " + key);
    Projection result;
    result.path = inner.get<std::string>("path");
    if (is_brief) {
      result.out_features = inner.json_.contains("out_features") ? inner.get<int64_t>("out_features") : 0;
      result.offset = inner.json_.contains("offset") ? inner.get<int64_t>("offset") : 0;
      return result;
    }
    result.in_features = inner.get<int64_t>("in_features");
    result.out_features = inner.get<int64_t>("out_features");
    result.offset = inner.get<int64_t>("offset");
    result.packed = inner.get<bool>("packed");
    return result;
  }

  std::optional<int64_t> optional_index(const char* key) const {
    return json_.contains(key) && !json_.at(key).is_null() ? std::optional(get<int64_t>(key)) : std::nullopt;
  }

 private:
  const OrderedJson& json_;
  std::string name_;
};

// The fields of a brief entry, and those that nobody reads.
const std::vector<std::string> kBrief = {"index", "layer",  "kind",      "query", "key",
                                         "value", "output", "locations", "notes"};

// An entry of attention that was not recognised, as a user writes it.
Layer brief_layer(const FieldReader& reader, const OrderedJson& json, const std::string& name) {
  for (const auto& [field, value] : json.items()) {
    TORCH_CHECK(std::find(kBrief.begin(), kBrief.end(), field) != kBrief.end(), name, ": \"", field,
                "\" is found where \"index\" is null; leave it out, or give all fields as `inspect --json --sites` "
                "prints them");
  }
  Layer layer;
  layer.has_core = false;
  layer.is_brief = true;
  layer.number = reader.get<int64_t>("layer");
  layer.kind = json.contains("kind")
                   ? reader.one_of("kind", {AttentionKind::kSelf, AttentionKind::kEncoder, AttentionKind::kCross})
                   : AttentionKind::kSelf;
  for (const auto& [key, projection] : kRoles) {
    layer.*projection = reader.projection(key, /*is_brief=*/true);
  }
  TORCH_CHECK(layer.number >= 0, name, ": expected \"layer\" of at least 0, got ", layer.number);
  return layer;
}

Layer layer_from_json(const OrderedJson& json, size_t position) {
  const std::string name = "sites: entry " + std::to_string(position) + " of \"layers\"";
  const FieldReader reader(json, name);
  static const OrderedJson kKnown = to_json(Layer{});
  for (const auto& [field, value] : json.items()) {
    TORCH_CHECK(kKnown.contains(field), name, ": there is no field \"", shown_text(field), "\"");
    if (field != "notes") {  // which nobody reads
      check_texts(value, name + ": \"" + field + "\"");
    }
  }
  Layer layer;
  layer.has_core = !json.contains("index") || !json.at("index").is_null();
  if (!layer.has_core && !json.contains("norm_order")) {
    return brief_layer(reader, json, name);
  }
  layer.index = layer.has_core ? reader.get<int64_t>("index") : 0;
  layer.number = reader.get<int64_t>("layer");
  TORCH_CHECK(layer.index >= 0 && layer.number >= 0, "sites: entry ", position,
              " of \"layers\": expected \"index\" and \"layer\" of at least 0, got ", layer.index, " and ",
              layer.number);
  layer.shares = reader.optional_index("shares");
  layer.stack = reader.optional_index("stack").value_or(0);  // files of earlier versions have none
  layer.kind = reader.one_of("kind", {AttentionKind::kSelf, AttentionKind::kEncoder, AttentionKind::kCross});
  layer.num_heads = reader.get<int64_t>("num_heads");
  layer.num_kv_heads = reader.get<int64_t>("num_kv_heads");
  layer.head_dim = reader.get<int64_t>("head_dim");
  layer.hidden_size = reader.get<int64_t>("hidden_size");
  layer.norm_order = reader.one_of("norm_order", {NormOrder::kPost, NormOrder::kPre, NormOrder::kNone});
  layer.ffn_norm_order = reader.one_of("ffn_norm_order", {NormOrder::kPost, NormOrder::kPre, NormOrder::kNone});
  layer.has_attention_mask = reader.get<bool>("attention_mask");
  layer.has_relative_scores = json.contains("relative_scores") && reader.get<bool>("relative_scores");  // as "stack"
  for (const auto& [key, projection] : kRoles) {
    layer.*projection = reader.projection(key, /*is_brief=*/false);
  }
  layer.has_attention_residual = reader.get<bool>("attention_residual");
  layer.has_ffn_residual = reader.get<bool>("ffn_residual");
  return layer;
}

}  // namespace

int64_t Structure::depth() const {
  int64_t result = 0;
  for (const Layer& layer : layers) {
    result = std::max(result, layer.number + 1);
  }
  return result;
}

size_t Structure::position(int64_t index) const {
  const auto found =
      std::find_if(layers.begin(), layers.end(), [&](const Layer& layer) { return layer.index == index; });
  TORCH_INTERNAL_ASSERT(found != layers.end(), "no layer ", index);
  return static_cast<size_t>(found - layers.begin());
}

std::string embeddings_in_words(const Structure& structure) {
  if (!structure.several_outputs.empty()) {
    return "several linear maps to the vocabulary, of which its output embeddings are one: " +
           structure.several_outputs;
  }
  if (!structure.other_outputs.empty()) {
    return "no linear map to the vocabulary; one to another number of outputs: " + structure.other_outputs;
  }
  return structure.embedding_note;
}

std::string to_json(const Structure& structure) {
  OrderedJson json = {{"layers", OrderedJson::array()}, {"near_misses", structure.near_misses}};
  json["linear_maps"] = OrderedJson::array();
  for (const Layer& layer : structure.layers) {
    json["layers"].push_back(to_json(layer));
    for (const Projection& linear : layer.linear_maps) {
      OrderedJson entry = to_json(std::optional(linear));
      entry["embedding"] = linear.is_embedding;
      json["linear_maps"].push_back(std::move(entry));
    }
  }
  json["embeddings"] = {{"size", structure.embedding_size > 0 ? OrderedJson(structure.embedding_size) : OrderedJson()},
                        {"output", structure.has_output_embeddings},
                        {"note", embeddings_in_words(structure)}};
  return json.dump();
}

Structure structure_from_json(const std::string& text) {
  const auto json = parse_json<OrderedJson>(text, "sites");
  TORCH_CHECK(json.is_object() && json.contains("layers") && json.at("layers").is_array(),
              "sites: expected an object with a list \"layers\", as `inspect --json` prints it");
  Structure structure;
  for (const OrderedJson& layer : json.at("layers")) {
    structure.layers.push_back(layer_from_json(layer, structure.layers.size()));
  }
  return structure;
}

}  // namespace torchgraft
