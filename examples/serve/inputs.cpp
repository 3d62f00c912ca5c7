#include "inputs.h"

#include <torchgraft/registration/parse_json.h>

#include <ATen/ATen.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

namespace {

using nlohmann::json;

[[noreturn]] void complain(const std::string& where, const std::string& what) {
  throw std::runtime_error(where + ": " + what);
}

at::ScalarType parse_dtype(const std::string& where, const json& name) {
  static const std::map<std::string, at::ScalarType, std::less<>> dtypes = {
      {"int64", at::kLong}, {"int32", at::kInt}, {"float32", at::kFloat}, {"float64", at::kDouble}, {"bool", at::kBool},
  };
  const auto found = name.is_string() ? dtypes.find(name.get<std::string>()) : dtypes.end();
  if (found == dtypes.end()) {
    complain(where, "expected one of bool, float32, float64, int32, int64, got " + name.dump());
  }
  return found->second;
}

// The sizes of a nested list, read off its first elements.
std::vector<int64_t> shape_of(const json& list) {
  std::vector<int64_t> shape;
  for (const json* inner = &list; inner->is_array(); inner = &inner->front()) {
    shape.push_back(static_cast<int64_t>(inner->size()));
    if (inner->empty()) {
      break;
    }
  }
  return shape;
}

// Copies the numbers of `list` to `next`, row after row. depth: how many dimensions of `shape` enclose `list`. true and
// false are numbers only where `dtype` is bool.
template <typename Number>
void copy_numbers(const std::string& where, const json& list, const std::vector<int64_t>& shape, size_t depth,
                  at::ScalarType dtype, Number*& next) {
  if (depth == shape.size()) {
    if (list.is_boolean() && dtype == at::kBool) {
      *next++ = list.get<bool>() ? 1 : 0;
    } else if (list.is_number() && (std::is_floating_point_v<Number> || list.is_number_integer())) {
      *next++ = list.get<Number>();
    } else {
      complain(where, "expected " + std::string(std::is_floating_point_v<Number> ? "a number" : "an integer") +
                          ", got " + list.dump());
    }
    return;
  }
  if (!list.is_array() || static_cast<int64_t>(list.size()) != shape[depth]) {
    complain(where, "expected a list of " + std::to_string(shape[depth]) + " as its first neighbour is, got " +
                        (list.is_array() ? "one of " + std::to_string(list.size()) : list.dump()));
  }
  for (size_t index = 0; index < list.size(); ++index) {
    copy_numbers(where + "[" + std::to_string(index) + "]", list[index], shape, depth + 1, dtype, next);
  }
}

at::Tensor to_tensor(const std::string& where, const json& list, at::ScalarType dtype) {
  const std::vector<int64_t> shape = shape_of(list);
  const bool floating = at::isFloatingType(dtype);
  at::Tensor tensor = at::empty(shape, floating ? at::kDouble : at::kLong);
  if (floating) {
    auto* next = tensor.data_ptr<double>();
    copy_numbers(where, list, shape, 0, dtype, next);
  } else {
    auto* next = tensor.data_ptr<int64_t>();
    copy_numbers(where, list, shape, 0, dtype, next);
  }
  return tensor.to(dtype);
}

}  // namespace

std::vector<c10::IValue> read_inputs(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    complain(path, "cannot be read");
  }
  const std::string text(std::istreambuf_iterator<char>(file), {});
  const json document = torchgraft::parse_json(text, path);
  const json inputs = document.is_object() ? document.value("inputs", json()) : json();
  if (!inputs.is_array()) {
    complain(path, R"(expected {"inputs": [one nested list per argument of forward], "dtypes": [...]})");
  }
  const json dtypes = document.value("dtypes", json(std::vector<std::string>(inputs.size(), "int64")));
  if (!dtypes.is_array() || dtypes.size() != inputs.size()) {
    complain(path, "expected as many dtypes as inputs, " + std::to_string(inputs.size()) + ", got " + dtypes.dump());
  }
  std::vector<c10::IValue> arguments;
  for (size_t index = 0; index < inputs.size(); ++index) {
    const std::string place = "[" + std::to_string(index) + "]";
    if (inputs[index].is_null()) {
      arguments.emplace_back();
    } else {
      const at::ScalarType dtype = parse_dtype(path + ": dtypes" + place, dtypes[index]);
      arguments.emplace_back(to_tensor(path + ": inputs" + place, inputs[index], dtype));
    }
  }
  return arguments;
}
