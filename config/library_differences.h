#pragma once

#include <torchgraft/config/method_configs.h>
#include <torchgraft/registration/export.h>

#include <optional>
#include <string>
#include <string_view>

namespace torchgraft {

// Where adapters==1.3.0 departs from its own definitions: an adapter that it has trained needs what it computes.
// docs/adapters.md lists the cases.
struct LibraryDifference {
  std::string refused;  // why the adapter would give other results here, and what to do; empty: it does not
  std::string warned;   // what cannot be known from the directory; empty: nothing
};

// Reads "model_type" and the configuration in the text of an adapter_config.json. A file without "model_type" was not
// written by the library, or somebody accepts the difference: it has none. Throws c10::Error for malformed text, as
// config_from_json does.
TORCHGRAFT_PATCH_API LibraryDifference library_difference(std::string_view adapter_config);

// `model_type` if the library wires some bottleneck of `config` on such a model in its own way, which a graph can have
// too, or counts layers in its own way and `config` names some, or has prefixes; else empty.
std::string library_wiring(const std::string& model_type, const AdapterConfig& config);

// Whether the library's prefixes in `config` move the relative positions of this model's tokens, if its scores have a
// term of queries or keys and positions (position_embedding_type "relative_key" of BERT and its relatives). On DeBERTa
// they do not. T5's positions, whose term has no queries, are refused by library_difference().
bool library_moves_positions(const std::string& model_type, const AdapterConfig& config);

// Whether the library puts the inverse of an invertible adapter before the output embeddings of this model, as it does
// in its own heads and in models that it knows by an interface, but not in models with heads of `transformers`.
// nullopt: the class has no output embeddings, or is not known.
std::optional<bool> library_inverts_output(const std::string& model_type, const std::string& model_class);

}  // namespace torchgraft
