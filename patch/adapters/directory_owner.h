#pragma once

#include <string>
#include <vector>

namespace torchgraft {

// What a directory can hold: files that one file, the marker, gives a name to.
struct OwnedFiles {
  const char* marker;               // a JSON file with the key "name"
  std::vector<const char*> others;  // what a save replaces or removes
  std::string kind;                 // "the adapter": what stands before the name
  std::string article_and_kind;     // "an adapter": whose files those without a marker are
  std::string expected;             // "an adapter of AdapterHub": what a marker without a name is not
};

// Whose files a directory holds, in words: "the adapter 'task'". `wanted` when it holds those, or none. The marker that
// a killed save had not yet put in place counts, too.
std::string owner_of(const std::string& directory, const std::string& wanted, const OwnedFiles& files);

}  // namespace torchgraft
