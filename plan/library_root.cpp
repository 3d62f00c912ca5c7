#include <torchgraft/plan/library_root.h>

#include <torchgraft/plan/checkpoint.h>

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <map>
#include <vector>

namespace torchgraft {

std::string from_library_root(const std::string& key) {
  static const std::vector<std::string> kRoots = {"encoder", "decoder", "transformer", "text_model", "vision_model",
                                                  "h",       "layers",  "layer",       "block",      "blocks"};
  const std::vector<std::string> path = split_path(key);
  const auto root = std::find_first_of(path.begin(), path.end(), kRoots.begin(), kRoots.end());
  return root == path.end() ? key : c10::Join(".", std::vector<std::string>(root, path.end()));
}

bool are_told_apart_from_root(const Structure& structure) {
  std::map<std::string, std::string> paths;
  for (const Layer& layer : structure.layers) {
    for (const auto* projection : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.ffn_in}) {
      const std::string path = *projection ? (*projection)->path : "";
      if (!path.empty() && paths.emplace(from_library_root(path), path).first->second != path) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace torchgraft
