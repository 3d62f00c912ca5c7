#include <torchgraft/config/closest_name.h>

#include <algorithm>
#include <cctype>
#include <numeric>

namespace torchgraft {
namespace {

// Levenshtein's distance: how many letters have to be put in, left out or exchanged.
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0]++;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t exchanged = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({exchanged, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string plain_name(std::string_view name) {
  std::string result;
  for (const char c : name) {
    if (std::string_view("_- ()^").find(c) == std::string_view::npos) {
      result += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  constexpr std::string_view kSuffix = "config";
  if (result.size() > kSuffix.size() && result.ends_with(kSuffix)) {
    result.resize(result.size() - kSuffix.size());
  }
  return result;
}

std::string did_you_mean(std::string_view name, const std::vector<std::string>& known) {
  const std::string plain = plain_name(name);
  const size_t most = std::max<size_t>(1, plain.size() / 3);
  if (plain.size() < 2 || plain.size() > 64) {  // one letter resembles everything; a long text is no name
    return "";
  }
  const std::string* closest = nullptr;
  size_t least = most + 1;
  for (const std::string& candidate : known) {
    const std::string other = plain_name(candidate);
    const size_t distance = edit_distance(plain, other);
    if (other.size() > 1 && distance < least) {
      least = distance;
      closest = &candidate;
    }
  }
  return closest ? "; did you mean '" + *closest + "'?" : "";
}

}  // namespace torchgraft
