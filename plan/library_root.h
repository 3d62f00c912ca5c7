#pragma once

#include <torchgraft/plan/structure.h>

#include <string>

namespace torchgraft {

// `key` from where the library's models begin: a model may have been traced inside a wrapper ("model.encoder.layer.0")
// or under a head ("bert.encoder.layer.0"), whose name load_adapter() of the library would not expect.
std::string from_library_root(const std::string& key);

// Whether paths without what stands before the library's root still tell layers apart: not those of two towers of one
// model, "a.layers.0" and "b.layers.0", which the library does not know.
bool are_told_apart_from_root(const Structure& structure);

}  // namespace torchgraft
