#include <torchgraft/patch/adapters/directory_owner.h>

#include <torchgraft/patch/adapters/adapter_files.h>
#include <torchgraft/patch/adapters/directory_update.h>
#include <torchgraft/plan/regular_file.h>
#include <torchgraft/registration/parse_json.h>

#include <nlohmann/json.hpp>

namespace torchgraft {
namespace {

std::string owner_in(const std::string& marker, const OwnedFiles& files) {
  try {
    const auto json = parse_json(read_text(marker, kLongestConfig), marker);
    if (json.is_object() && json.contains("name") && json.at("name").is_string()) {
      return files.kind + " '" + json.at("name").get<std::string>() + "'";
    }
  } catch (const c10::Error&) {
  }
  return "something other than " + files.expected;
}

}  // namespace

std::string owner_of(const std::string& directory, const std::string& wanted, const OwnedFiles& files) {
  const std::string marker = directory + "/" + files.marker;
  if (is_file_there(marker)) {
    return owner_in(marker, files);
  }
  const std::vector<std::string> staged = DirectoryUpdate::staged_markers(directory, files.marker);
  for (const std::string& path : staged) {  // a save that was killed says whose the other files are
    const std::string owner = owner_in(path, files);
    if (owner != wanted && is_file_there(path)) {
      return owner;
    }
  }
  for (const char* file : files.others) {
    if (staged.empty() && is_file_there(directory + "/" + file)) {
      return "files of " + files.article_and_kind + " (" + file + ") without an " + files.marker;
    }
  }
  return wanted;
}

}  // namespace torchgraft
