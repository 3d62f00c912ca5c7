#pragma once

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// What the names in the path of a saved module say: "encoder.layer.0.attention.self.query", cut at its dots.
using SavedPath = std::vector<std::string>;

// The position of the layer's number: the first number there.
std::optional<size_t> number_position(const SavedPath& path);

// Whether the last name of `path` ("fc1") does not tell which of three maps a gated feed-forward block has it for.
bool is_unclear_beside_gate(const SavedPath& path);

// Whether a part of the path contains `word`.
bool mentions(const SavedPath& path, const std::string& word);

bool is_cross_attention(const SavedPath& path);

// The sites of a LoRA on a projection of this path, in the order in which a packed projection holds them; none where
// the names are not known.
std::vector<std::string> lora_sites(const SavedPath& path);

}  // namespace torchgraft
