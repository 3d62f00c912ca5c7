#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace torchgraft {

// Walks over a pickle as TorchScript files hold them and makes nothing of it: no object, no call. Throws c10::Error
// where a record is shorter than a storage, or a storage than a tensor's shape, and where torch's own reader would not
// go on.
// record_bytes: the size of the record that a storage's key names.
TORCHGRAFT_API void check_pickled_tensors(std::string_view pickle,
                                          const std::function<uint64_t(const std::string& key)>& record_bytes);

}  // namespace torchgraft
