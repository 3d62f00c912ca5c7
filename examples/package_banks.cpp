#include "package_banks.h"

#include <c10/util/StringUtil.h>

#include <map>

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
