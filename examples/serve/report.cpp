#include "report.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

namespace {

using nlohmann::json;

constexpr int64_t kShownValues = 5;
constexpr size_t kShownRows = 8;  // of a batch, in the gate tables

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) {
    return *middle;
  }
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// float32 rather than Float: the name that Python shows.
std::string dtype_name(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kLong:
      return "int64";
    default:
      return at::toString(tensor.scalar_type());
  }
}

void print_output(std::ostream& stream, const at::Tensor& output) {
  stream << "output  " << dtype_name(output) << " " << output.sizes() << "\n        ";
  const at::Tensor values = output.to(at::kDouble).reshape({-1});
  const int64_t shown = std::min(kShownValues, values.numel());
  stream << std::fixed << std::setprecision(6);
  for (int64_t index = 0; index < shown; ++index) {
    stream << values[index].item<double>() << " ";
  }
  stream << (shown < values.numel() ? "..." : "") << "\n";
}

// gate: [gates]. "0.5120", or "0.5120/0.4980" where a location has several: q and v of LoRA, a prefix's keys and
// values.
std::string gate_cell(const at::Tensor& gate) {
  std::ostringstream cell;
  cell << std::fixed << std::setprecision(4);
  for (int64_t index = 0; index < gate.size(0); ++index) {
    cell << (index > 0 ? "/" : "") << gate[index].item<double>();
  }
  return cell.str();
}

void print_gates(std::ostream& stream, const AdapterGates& gates) {
  if (gates.layers.empty()) {
    stream << "gates of " << gates.adapter << ": none, it is not gated\n";
    return;
  }
  const size_t shown = std::min(kShownRows, gates.rows.size());
  std::vector<std::vector<std::string>> lines = {{"layer", "location"}};
  for (size_t index = 0; index < shown; ++index) {
    lines[0].push_back("row " + std::to_string(gates.rows[index]));
  }
  for (const auto& [layer, locations] : gates.layers) {
    for (const auto& [location, values] : locations) {
      std::vector<std::string> line = {std::to_string(layer), location};
      for (size_t index = 0; index < shown; ++index) {
        line.push_back(gate_cell(values[static_cast<int64_t>(index)]));
      }
      lines.push_back(std::move(line));
    }
  }
  stream << "gates of " << gates.adapter;
  if (shown < gates.rows.size()) {
    stream << " (the first " << shown << " of " << gates.rows.size() << " rows)";
  }
  stream << "\n";
  std::vector<size_t> widths(lines[0].size());
  for (const auto& line : lines) {
    for (size_t column = 0; column < line.size(); ++column) {
      widths[column] = std::max(widths[column], line[column].size());
    }
  }
  for (const auto& line : lines) {
    for (size_t column = 0; column < line.size(); ++column) {
      // The location is text, the rest are numbers.
      stream << "  " << (column == 1 ? std::left : std::right) << std::setw(static_cast<int>(widths[column]))
             << line[column];
    }
    stream << "\n";
  }
}

// values: float64, contiguous. Nested lists as the shape says; a list of one dimension holds numbers.
json nested_list(const at::Tensor& values) {
  json list = json::array();
  if (values.dim() == 0) {
    return values.item<double>();
  }
  if (values.dim() == 1) {
    const double* data = values.const_data_ptr<double>();
    return std::vector<double>(data, data + values.size(0));
  }
  for (int64_t index = 0; index < values.size(0); ++index) {
    list.push_back(nested_list(values[index]));
  }
  return list;
}

json to_json(const at::Tensor& tensor) { return nested_list(tensor.to(at::kDouble).contiguous()); }

}  // namespace

void print_report(std::ostream& stream, const Response& response, const std::vector<double>& milliseconds) {
  print_output(stream, response.output);
  for (const AdapterGates& gates : response.gates) {
    print_gates(stream, gates);
  }
  if (!milliseconds.empty()) {
    stream << "latency " << std::fixed << std::setprecision(3) << median(milliseconds) << " ms (median of "
           << milliseconds.size() << ")\n";
  }
}

void write_report(const std::string& path, const Response& response, const std::vector<double>& milliseconds) {
  json document;
  document["output"] = {{"shape", response.output.sizes().vec()},
                        {"dtype", dtype_name(response.output)},
                        {"values", to_json(response.output)}};
  document["gates"] = json::object();
  for (const AdapterGates& gates : response.gates) {
    json layers = json::object();
    for (const auto& [layer, locations] : gates.layers) {
      for (const auto& [location, values] : locations) {
        layers[std::to_string(layer)][location] = to_json(values);
      }
    }
    document["gates"][gates.adapter] = {{"rows", gates.rows}, {"layers", std::move(layers)}};
  }
  document["milliseconds"] = milliseconds;
  std::ofstream file(path);
  file << document.dump() << "\n";
  file.close();
  if (!file) {
    throw std::runtime_error(path + ": cannot be written");
  }
}
