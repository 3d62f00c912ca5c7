#pragma once

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

// The one way from text to JSON values. Texts come from files and requests of strangers; scripts/check_tree.py holds
// that nobody calls the library's own parse(). Whoever includes this header needs nlohmann/json.hpp.
namespace torchgraft {

// Levels of brackets. Code that copies, prints or walks a value calls itself once for each level, so that a text of a
// million brackets would end the process.
constexpr int kDeepestJson = 64;

// Whether brackets outside strings open more than `most` levels. Says so of a text that is not JSON, too, at the latest
// where a parser would stop.
inline bool is_nested_deeper(std::string_view text, int most) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      in_string = c != '"';
      i += c == '\\' ? 1 : 0;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > most) {
        return true;
      }
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// The parser's reason without its own name, short and printable: it repeats the text's bytes, whatever they are.
inline std::string json_fault(std::string_view message) {
  constexpr size_t kLongest = 200;
  const size_t name = message.find("] ");
  std::string fault(name == std::string_view::npos ? message : message.substr(name + 2));
  if (fault.size() > kLongest) {
    fault = fault.substr(0, kLongest) + "...";
  }
  for (char& c : fault) {
    c = c >= ' ' && c < 0x7f ? c : '?';
  }
  return fault;
}

// Bytes of a stranger's text in a message.
constexpr size_t kLongestShown = 200;

// A stranger's text (a name, a key, a path) for a message. A long one is cut, but not within a character.
inline std::string shown_text(std::string text, size_t longest = kLongestShown) {
  if (text.size() <= longest) {
    return text;
  }
  const auto is_inside = [&](size_t place) { return (static_cast<unsigned char>(text[place]) & 0xC0) == 0x80; };
  while (longest > 0 && is_inside(longest)) {
    --longest;
  }
  return text.substr(0, longest) + "...";
}

// The same of a value.
template <typename Json>
std::string shown_json(const Json& value, size_t longest = kLongestShown) {
  return shown_text(value.dump(-1, ' ', false, Json::error_handler_t::replace), longest);
}

// Names, keys and values that are texts. What is longer is nothing that anybody wrote, and errors repeat it.
constexpr size_t kLongestText = 1000;  // bytes

// Throws c10::Error, in the name of `source`, when a text is longer than that.
inline void check_text(const std::string& text, const std::string& source) {
  TORCH_CHECK(text.size() <= kLongestText, source, ": expected texts of at most ", kLongestText, " bytes, got one of ",
              text.size(), ": ", shown_text(text));
}

// Throws c10::Error when a key or a text in `value` is too long.
template <typename Json>
void check_texts(const Json& value, const std::string& source) {
  if (value.is_string()) {
    check_text(value.template get<std::string>(), source);
  }
  if (!value.is_structured()) {
    return;
  }
  for (const auto& [key, inner] : value.items()) {
    check_text(key, source);
    check_texts(inner, source);
  }
}

// Parses `text`. Throws c10::Error that begins with `source` (a file, a request) when it is not JSON, has a number
// beyond the range of double or bad UTF-8, or is nested deeper than `deepest`. `watch`: see nlohmann's parse().
template <typename Json = nlohmann::json>
Json parse_json(std::string_view text, const std::string& source, int deepest = kDeepestJson,
                const typename Json::parser_callback_t& watch = nullptr) {
  TORCH_CHECK(!is_nested_deeper(text, deepest), source, ": nested too deeply, expected JSON of at most ", deepest,
              " levels");
  try {
    return Json::parse(text, watch);
  } catch (const typename Json::exception& error) {
    TORCH_CHECK(false, source, ": not JSON (", json_fault(error.what()), ")");
  }
}

}  // namespace torchgraft
