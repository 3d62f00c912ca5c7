#pragma once

#include <torchgraft/registration/export.h>

#include <exception>
#include <string>

namespace torchgraft {

// What went wrong, as one line for a person. libtorch's messages carry traces: C++ ones behind the first line,
// TorchScript's before the line that counts, which reads "RuntimeError: gated_lora: expected ...".
// Never empty.
TORCHGRAFT_API std::string one_line(const std::string& message);

// The same of an exception's message.
TORCHGRAFT_API std::string one_line(const std::exception& error);

}  // namespace torchgraft
