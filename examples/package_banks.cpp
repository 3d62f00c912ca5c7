#include "package_banks.h"

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/StringUtil.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <map>
#include <stdexcept>

std::string size_text(const at::Tensor& tensor) { return c10::str(tensor.scalar_type(), " ", tensor.sizes()); }

std::set<const void*> memory_of(const std::vector<std::string>& names, const Banks& banks) {
  std::set<const void*> memory;
  for (const std::string& name : names) {
    if (const auto bank = banks.find(name); bank != banks.end()) {
      memory.insert(bank->second.data_ptr());
    }
  }
  return memory;
}

std::set<std::set<std::string>> sharing(const Banks& banks) {
  std::map<const void*, std::set<std::string>> groups;
  for (const auto& [name, bank] : banks) {
    if (bank.numel() > 0) {
      groups[bank.data_ptr()].insert(name);
    }
  }
  std::set<std::set<std::string>> shared;
  for (const auto& [memory, names] : groups) {
    if (names.size() > 1) {
      shared.insert(names);
    }
  }
  return shared;
}

namespace {

std::string joined_names(const std::set<std::string>& names) {
  std::string result;
  for (const std::string& name : names) {
    result += (result.empty() ? "" : " and ") + name;
  }
  return result;
}

}  // namespace

std::string other_sharing(const Banks& in_package, const Banks& in_file) {
  const auto before = sharing(in_package), after = sharing(in_file);
  for (const auto& group : before) {
    if (!after.contains(group)) {
      return joined_names(group) + " are one tensor in the package, and not in the new file";
    }
  }
  for (const auto& group : after) {
    if (!before.contains(group)) {
      return joined_names(group) + " are one tensor in the new file, and not in the package";
    }
  }
  return "";
}

nlohmann::json package_description(const std::string& path, const std::string& remedy) {
  std::unordered_map<std::string, std::string> metadata;
  try {
    metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not an AOTInductor package, or a damaged one (" + torchgraft::one_line(error) +
                             "); " + remedy);
  }
  const auto found = metadata.find("torchgraft");
  if (found == metadata.end()) {
    throw std::runtime_error(path + ": a package that torchgraft has not made; " + remedy);
  }
  return torchgraft::parse_json(found->second, path);
}
