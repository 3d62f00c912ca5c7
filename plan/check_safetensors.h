#pragma once

#include <cstdint>
#include <string>

namespace torchgraft {

// Reads the header of a file of the safetensors format, and not its tensors. Throws c10::Error where read_safetensors()
// would throw, but for a file that cannot be read to its end.
void check_safetensors(const std::string& path, uint64_t most_bytes);

}  // namespace torchgraft
