// Options that are numbers, for all examples. CLI11's own checks name the largest double that there is, take 010 for 8,
// and take what an int64_t cannot hold for the largest one.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <limits>
#include <string>
#include <system_error>
#include <type_traits>

// Bounds of an option, both included.
template <typename T>
struct Bounds {
  T least = std::numeric_limits<T>::lowest();
  T most = std::numeric_limits<T>::max();

  // " from 1 to 64"; only what somebody has set, unless `all`.
  std::string text(bool all) const {
    const bool has_least = all || std::is_unsigned_v<T> || least != std::numeric_limits<T>::lowest();
    const bool has_most = all || most != std::numeric_limits<T>::max();
    const bool is_positive = std::is_floating_point_v<T> && least == std::numeric_limits<T>::min();
    std::string words = is_positive ? " above 0" : has_least ? " from " + shown(least) : "";
    return words + (has_most ? " to " + shown(most) : "");
  }

  static std::string shown(T value) {
    char digits[64];
    return {digits, std::to_chars(digits, digits + sizeof(digits), value).ptr};
  }
};

// For CLI::Option::transform(): a decimal number within the bounds, and nothing else. Of a list: each number.
template <typename T>
CLI::Validator number(const Bounds<T>& bounds) {
  const auto check = [bounds](std::string& text) {
    T value = {};
    const char* end = text.data() + text.size();
    const auto [stop, fault] = std::from_chars(text.data(), end, value);
    const bool is_number = stop == end && fault == std::errc() && std::isfinite(static_cast<double>(value));
    if (is_number && value >= bounds.least && value <= bounds.most) {
      text = Bounds<T>::shown(value);  // CLI11 reads the text once more
      return std::string();
    }
    const bool is_beyond_type = std::is_integral_v<T> && stop == end && fault == std::errc::result_out_of_range;
    return std::string("expected ") + (std::is_integral_v<T> ? "an integer" : "a number") +
           bounds.text(is_beyond_type) + ", got " + text;
  };
  const std::string range = bounds.text(false);
  return {check, range.empty() ? range : range.substr(1)};
}

// app.add_option() of a number from `least` to `most`.
template <typename T>
CLI::Option* add_number(CLI::App& app, const std::string& name, T& value, const std::string& description,
                        std::type_identity_t<T> least = Bounds<T>().least,
                        std::type_identity_t<T> most = Bounds<T>().most) {
  return app.add_option(name, value, description)->transform(number<T>({least, most}));
}
