#pragma once

#include <ATen/core/Tensor.h>

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

// The banks of a grafted module, by the names that an AOTInductor package of it has for them.
using Banks = std::unordered_map<std::string, at::Tensor>;

constexpr const char* kBanks = "adapters.";  // the prefix of their names

// "Float [2, 8, 16]".
std::string size_text(const at::Tensor& tensor);

// What a package with constants of these names holds of `banks`: the memory of each. Layers may share one tensor, of
// which a package has one of the names.
std::set<const void*> memory_of(const std::vector<std::string>& names, const Banks& banks);

// The groups of names that stand for one tensor.
std::set<std::set<std::string>> sharing(const Banks& banks);

// How the new banks share tensors otherwise than the old ones, naming a group: "a and b are one tensor in the package,
// and not in the new file". Empty: they do not.
std::string other_sharing(const Banks& in_package, const Banks& in_file);

// What `torchgraft export` has written into a package. Loads none of its code. Throws std::runtime_error for what is no
// such package; `remedy` ends its text.
nlohmann::json package_description(const std::string& path, const std::string& remedy);
