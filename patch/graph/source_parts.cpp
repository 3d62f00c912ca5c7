#include <torchgraft/patch/graph/source_parts.h>

#include <array>
#include <charconv>

namespace torchgraft {

std::string number_source(double number) {
  std::array<char, 32> text{};  // the longest double has 24 characters
  const auto [end, error] = std::to_chars(text.begin(), text.end(), number);
  const std::string literal(text.begin(), end);
  return literal.find_first_of(".e") == std::string::npos ? literal + ".0" : literal;  // else it is an int
}

const std::string& additive_mask_source() {
  static const std::string source = R"python(
def additive_mask(blocked: Tensor, dtype: int) -> Tensor:
    return torch.masked_fill(torch.zeros_like(blocked, dtype=dtype), blocked, float("-inf"))
)python";
  return source;
}

}  // namespace torchgraft
