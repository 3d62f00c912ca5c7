#include <torchgraft/patch/read_adapter.h>

#include <torchgraft/config/library_differences.h>
#include <torchgraft/patch/adapters/adapter_files.h>
#include <torchgraft/patch/adapters/one_version.h>
#include <torchgraft/plan/check_safetensors.h>
#include <torchgraft/plan/regular_file.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/registration/parse_json.h>

#include <sys/stat.h>

#include <optional>

namespace torchgraft {
namespace {

constexpr const char* kKnownHeads =
    "heads for tagging, and for classification and regression by the first or last token, are; a prediction needs its "
    "own head";
constexpr const char* kReadInPython =
    " is for Python: torchgraft convert, given the folder that this directory is in, writes safetensors beside it";

// Anything of that name, also a link that leads nowhere: reading it says what is wrong with it.
bool is_there(const std::string& path) {
  struct stat status{};
  return lstat(path.c_str(), &status) == 0;
}

// Directories of the library without adapter_config.json hold something else. What save_adapter_setup() writes has the
// adapters' directories below it.
void check_holds_adapter(const std::string& directory) {
  const bool is_adapter = is_adapter_directory(directory);
  TORCH_CHECK(
      is_adapter || !is_setup_directory(directory), directory, ": it holds a composition (", kSetupFile,
      "), not an adapter; load_adapter_setup reads it in Python, and its adapters have directories of their own ",
      "in it");
  TORCH_CHECK(is_adapter || !is_there(directory + "/adapter_fusion_config.json"), directory,
              ": it holds AdapterFusion layers (adapter_fusion_config.json), not an adapter; load_adapter_fusion puts ",
              "them into a module that has their adapters");
}

// What PEFT writes has the same file names as AdapterHub's directories.
void check_is_adapter_hub(const std::string& path, const std::string& text) {
  const auto json = parse_json(text, path);
  TORCH_CHECK(!json.is_object() || !json.contains("peft_type"), path,
              ": it is an adapter of PEFT, which is read in Python: torchgraft load BASE.pt DIRECTORY -o OUT.pt, "
              "then torchgraft save OUT.pt NAME NEW_DIRECTORY writes what is read here");
}

// The "name" in the text of a configuration's file.
std::string saved_name(const std::string& path, const std::string& text) {
  const auto json = parse_json(text, path);
  TORCH_CHECK(json.is_object() && json.contains("name") && json.at("name").is_string(), path,
              ": expected a JSON object with a text \"name\"");
  const std::string name = json.at("name").get<std::string>();
  check_text(name, path + ": \"name\"");
  return name;
}

// What is read of a file of weights.
enum class Weights { kAll, kHeader };

StateDict read_weights(const std::string& path, uint64_t most_bytes, Weights wanted) {
  if (wanted == Weights::kHeader) {
    check_safetensors(path, most_bytes);
    return {};
  }
  return read_safetensors(path, most_bytes);
}

std::optional<HeadSpec> read_head(const std::string& directory, uint64_t most_weight_bytes, Weights wanted) {
  const std::string path = directory + "/" + kHeadConfigFile;
  if (!is_there(path)) {
    return std::nullopt;
  }
  const std::string text = read_text(path, kLongestConfig);
  parse_json(text, path);
  if (!is_known_head(text)) {
    TORCH_WARN(directory, ": the adapter's head is not loaded: ", kKnownHeads);
    return std::nullopt;
  }
  const std::string weights = directory + "/" + kHeadWeightsFile;
  TORCH_CHECK(is_there(weights), directory, ": no ", kHeadWeightsFile, " beside its ", kHeadConfigFile, "; a ",
              kPickledHeadFile, kReadInPython);
  return HeadSpec{head_config_from_json(text), read_weights(weights, most_weight_bytes, wanted),
                  saved_name(path, text)};
}

AdapterSpec read_files(const std::string& directory, const std::string& name, uint64_t most_weight_bytes,
                       Weights wanted) {
  const std::string path = directory + "/" + kConfigFile;
  const std::string text = read_text(path, kLongestConfig);
  check_is_adapter_hub(path, text);
  AdapterSpec spec;
  spec.saved_name = saved_name(path, text);
  spec.name = name.empty() ? spec.saved_name : name;
  spec.config = config_from_json(text);
  const LibraryDifference difference = library_difference(text);
  TORCH_CHECK(difference.refused.empty(), path, ": ", difference.refused);
  if (!difference.warned.empty()) {
    TORCH_WARN(path, ": ", difference.warned);
  }
  const std::string weights = directory + "/" + kWeightsFile;
  TORCH_CHECK(is_there(weights), directory, ": no ", kWeightsFile, "; a ", kPickledWeightsFile, kReadInPython);
  spec.weights = read_weights(weights, most_weight_bytes, wanted);
  spec.prefix_heads = saved_prefix_heads(text);
  spec.head = read_head(directory, most_weight_bytes, wanted);
  return spec;
}

AdapterSpec read_one_adapter(const std::string& directory, const std::string& name, uint64_t most_weight_bytes,
                             Weights wanted) {
  check_holds_adapter(directory);
  AdapterSpec spec;
  read_one_version(directory, {kConfigFile, kWeightsFile, kHeadConfigFile, kHeadWeightsFile}, kConfigFile,
                   [&] { spec = read_files(directory, name, most_weight_bytes, wanted); });
  return spec;
}

}  // namespace

AdapterSpec read_adapter_directory(const std::string& directory, const std::string& name, uint64_t most_weight_bytes) {
  return read_one_adapter(directory, name, most_weight_bytes, Weights::kAll);
}

AdapterConfig check_adapter_directory(const std::string& directory, uint64_t most_weight_bytes) {
  return read_one_adapter(directory, "", most_weight_bytes, Weights::kHeader).config;
}

bool is_adapter_directory(const std::string& directory) { return has_marker(directory, kConfigFile); }

bool is_setup_directory(const std::string& directory) { return is_there(directory + "/" + kSetupFile); }

Composition read_adapter_setup(const std::string& directory) {
  const std::string path = directory + "/" + kSetupFile;
  std::string text;
  read_one_version(directory, {kSetupFile}, kSetupFile, [&] { text = read_text(path, kLongestConfig); });
  const auto setup = parse_json(text, path);
  TORCH_CHECK(setup.is_object() && setup.contains("adapter_setup"), path,
              ": expected an object with \"adapter_setup\"");
  for (const auto& [key, value] : setup.items()) {
    TORCH_CHECK(key == "adapter_setup" || key == "head_setup" || key == "version", path, ": the key '", shown_text(key),
                "' is not known");
  }
  Composition tree = normalised(composition_from_json(setup.at("adapter_setup").dump()));
  const auto& last = tree.children.back();
  const std::string owner = tree.kind == BlockKind::kStack && last.kind == BlockKind::kAdapter ? last.name : "";
  const bool has_own = setup.contains("head_setup") && !setup.at("head_setup").is_null() &&
                       !(setup.at("head_setup").is_string() &&
                         (setup.at("head_setup") == owner || setup.at("head_setup").get<std::string>().empty()));
  TORCH_CHECK(!has_own, path, ": it has heads of its own (head_setup), which are read in Python (load_adapter_setup)");
  return tree;
}

AdapterConfig read_adapter_config(const std::string& directory) {
  check_holds_adapter(directory);
  const std::string path = directory + "/" + kConfigFile;
  std::string text;
  read_one_version(directory, {kConfigFile}, kConfigFile, [&] { text = read_text(path, kLongestConfig); });
  check_is_adapter_hub(path, text);
  return config_from_json(text);
}

}  // namespace torchgraft
