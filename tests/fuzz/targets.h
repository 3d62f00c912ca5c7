#pragma once

#include <map>
#include <string>
#include <string_view>

// The readers of what strangers write, as functions of bytes. Whatever the bytes are, a target returns or throws
// c10::Error.
namespace torchgraft::fuzz {

using Target = void (*)(std::string_view bytes);

// By name, which is also that of the folder in corpus/.
const std::map<std::string, Target>& targets();

// Calls the target. An exception of another kind leaves this function; c10::Error does not.
void run(Target target, std::string_view bytes);

}  // namespace torchgraft::fuzz
