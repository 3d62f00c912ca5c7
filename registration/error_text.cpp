#include <torchgraft/registration/error_text.h>

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace torchgraft {
namespace {

// Whether the line reads "RuntimeError: text", as the one that TorchScript ends a trace with does. Then `line` becomes
// the text. A failed `assert` reads "RuntimeError: AssertionError: text".
bool take_raised_text(std::string_view& line) {
  constexpr std::string_view kMarker = "Error: ";
  bool is_raised = false;
  for (;;) {
    const size_t marker = line.find(kMarker);
    if (marker == std::string_view::npos || line.find(' ') < marker) {
      return is_raised;
    }
    line.remove_prefix(marker + kMarker.size());
    is_raised = true;
  }
}

}  // namespace

std::string one_line(const std::string& message) {
  std::string_view rest = message;
  rest.remove_prefix(std::min(rest.find_first_not_of(" \t\r\n"), rest.size()));  // TorchScript's begin with a new line
  std::string_view result = rest.substr(0, rest.find('\n'));
  while (!rest.empty()) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (take_raised_text(line)) {
      result = line;
    }
  }
  return result.empty() ? "it did not say why" : std::string(result);
}

std::string one_line(const std::exception& error) { return one_line(std::string(error.what())); }

}  // namespace torchgraft
