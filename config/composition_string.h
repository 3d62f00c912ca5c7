#pragma once

#include <torchgraft/config/composition.h>
#include <torchgraft/registration/export.h>

#include <string>
#include <string_view>

namespace torchgraft {

// A composition as it stands in Python: "Stack(en, Average(a, b, weights=[0.3, 0.7]))". Names with other characters
// than letters, digits, "_" and "-" stand in quotes. A name alone is a Stack of it. Throws c10::Error that says what is
// expected where, and as check_composition does.
TORCHGRAFT_PATCH_API Composition composition_from_string(std::string_view text);
// Whether it is the text of a block, not the name of an adapter: one that begins with "Stack(", say.
TORCHGRAFT_PATCH_API bool is_composition_text(std::string_view text);
TORCHGRAFT_PATCH_API std::string composition_to_string(const Composition& composition);

}  // namespace torchgraft
